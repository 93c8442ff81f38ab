"""Best-first search with a beam in plain Python: what csrc/graph_search.cpp computes."""

from torch import Tensor


def beam_search(
    keys: Tensor, adjacency: Tensor, entries: Tensor, query: Tensor, k: int, ef: int
) -> tuple[list[int], list[float], int]:
    """ids and scores [k], best first, smaller ids first among equal scores, -1 and -inf pads, and the keys scored.

    keys [n, D], adjacency [n, degree] and entries with -1 pads, query [D].
    """
    width = min(max(ef, k), len(keys))
    met: set[int] = set()
    expanded: set[int] = set()
    beam: list[tuple[float, int]] = []
    links = entries.tolist()
    while True:
        fresh = [y for y in dict.fromkeys(links) if y >= 0 and y not in met]
        met.update(fresh)
        beam = sorted([*beam, *((-float(keys[y].float() @ query.float()), y) for y in fresh)])[:width]
        waiting = [y for _, y in beam if y not in expanded]
        if not waiting:
            break
        expanded.add(waiting[0])
        links = adjacency[waiting[0]].tolist()
    found = beam[:k]
    pads = k - len(found)
    return [y for _, y in found] + [-1] * pads, [-score for score, _ in found] + [float("-inf")] * pads, len(met)
