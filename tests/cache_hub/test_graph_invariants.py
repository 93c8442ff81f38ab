"""What holds for every graph and every search, whatever the keys: cases drawn by hypothesis, the same on every run."""

from dataclasses import dataclass
from typing import Any

import torch
from graph_checks import check_structure
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cache_hub.index import AttentionAwareGraphIndex

KINDS = ["normal", "whole numbers", "all equal", "zeros", "one huge", "one line"]


@dataclass
class Case:
    """keys [2, n, D] and queries [2, g, m, D] of a kind, seen from positions [m] or everywhere, and build options."""

    keys: Tensor
    queries: Tensor
    positions: Tensor | None
    options: dict[str, Any]


def make_keys(kind: str, n: int, dim: int) -> Tensor:
    keys = torch.randn(2, n, dim)
    if kind == "whole numbers":  # duplicates, and equal scores
        keys = torch.randint(-1, 2, (2, n, dim)).float()
    if kind == "all equal":
        keys[:] = keys[:, :1].clone()
    if kind == "zeros":
        keys.zero_()
    if kind == "one huge":
        keys[:, n // 2] *= 1e4
    if kind == "one line":
        keys = keys[..., :1] * torch.randn(2, 1, dim)
    return keys


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, dim, group = draw(st.integers(1, 80)), draw(st.sampled_from([1, 2, 8, 17])), draw(st.integers(1, 3))
    degree = draw(st.integers(2, 12))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    asked = draw(st.integers(1, 60))
    positions = torch.randint(-3, n, (asked,)).sort().values if draw(st.booleans()) else None
    options = {
        "key_degree": degree,
        "key_links": draw(st.integers(0, degree)),
        "projection": draw(st.sampled_from(["co_occurrence", "roargraph"])),
        "q_knn": draw(st.integers(2, 12)),
        "num_entries": draw(st.integers(1, 8)),
        "index_dtype": draw(st.sampled_from(["auto", "int8"])),
        "ef_search": draw(st.integers(1, 20)),
    }
    keys = make_keys(draw(st.sampled_from(KINDS)), n, dim).to(dtype)
    return Case(keys, torch.randn(2, group, asked, dim), positions, options)


def build(case: Case, threads: int, **changes: Any) -> AttentionAwareGraphIndex:
    index = AttentionAwareGraphIndex(num_threads=threads, **{**case.options, **changes})
    index.build(case.keys, case.queries, case.positions)
    return index


quick = settings(derandomize=True, max_examples=250, deadline=None, database=None)


@quick
@given(cases())
def test_links(case: Case) -> None:
    index, n = build(case, 1), case.keys.shape[1]
    check_structure(index, n, case.options["key_degree"])
    assert (index.entries >= 0).sum(1).tolist() == [min(n, case.options["num_entries"])] * len(case.keys)


@quick
@given(cases())
def test_thread_counts_make_no_difference(case: Case) -> None:
    one, two = build(case, 1), build(case, 2)
    assert torch.equal(one.links.data, two.links.data)
    assert torch.equal(one.entries, two.entries)
    a, b = (index.search(case.queries[:, :, -1], 5) for index in (one, two))
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.scores, b.scores)
    assert torch.equal(a.keys_scored, b.keys_scored)


@quick
@given(cases(), st.integers(1, 100))
def test_a_beam_of_all_keys_is_brute_force(case: Case, k: int) -> None:
    n = case.keys.shape[1]
    index, asked = build(case, 2, ef_search=n), case.queries[:, :, -1]
    found = index.search(asked, k)
    exact = asked @ case.keys.float().transpose(1, 2)
    best = exact.sort(dim=2, descending=True).values[..., :k]
    # Sums of products of 1e4: rounding is relative to the largest.
    close = {"rtol": 1e-5, "atol": 1e-5 * float(exact.abs().max().clamp(min=1))}
    torch.testing.assert_close(found.scores[..., :n], best, **close)
    torch.testing.assert_close(exact.gather(2, found.ids[..., :n].long()), best, **close)
    assert bool((found.ids[..., n:] == -1).all())


@quick
@given(cases(), st.integers(1, 30))
def test_whatever_the_beam_scores_are_exact_and_sorted(case: Case, k: int) -> None:
    index, asked = build(case, 1), case.queries[:, :, -1]
    found = index.search(asked, k)
    exact = asked @ case.keys.float().transpose(1, 2)
    kept = found.ids >= 0
    named = torch.where(kept, exact.gather(2, found.ids.clamp(min=0).long()), float("-inf"))
    torch.testing.assert_close(found.scores, named, rtol=1e-5, atol=1e-5 * float(exact.abs().max().clamp(min=1)))
    assert torch.equal(found.scores, found.scores.sort(dim=2, descending=True).values)
    for ids in found.ids.flatten(0, 1).tolist():
        named_ids = [y for y in ids if y >= 0]
        assert len(set(named_ids)) == len(named_ids)
    counted = int(found.keys_scored.max())
    assert counted <= case.keys.shape[1] * (2 if case.options["index_dtype"] == "int8" else 1)
