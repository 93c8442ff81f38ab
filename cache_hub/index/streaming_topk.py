"""Exact top-k of inner products on a GPU at nearly the speed of the products, whose tiles never leave the chip.

1. Of every sixteenth key the scores of all queries: about a quarter of k in the sample make about 4 k of all keys.
2. The scores of all keys, in 16 bits: what reaches that threshold is a candidate, kept as a bit.
3. The scores of the candidates in float32, the best k of them, and a proof: no other key scores above the threshold by
   more than what 16 bits and the order of sums can change, which the k-th best does. Queries without it (too few or too
   many candidates: about 1 in 500, all where most keys score the same) are asked again by chunk_topk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_topk import CHUNK, chunk_topk
from .topk_kernels import LISTS, expand_kernel, hits_kernel, rank_kernel, score_kernel, threshold_kernel

# Bytes of the candidates of the queries that are asked together, and of what chunk_topk holds.
_BYTES = 1 << 30
# Triton's interpreter multiplies in float32.
_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A power of two that brings the largest element near the end of float16's range.
_EXPONENT, _LEAST = 14, 2.0**-20
Beside: TypeAlias = "tuple[Tensor, Tensor] | None"


@dataclass(frozen=True)
class Tiles:
    """Of a kernel: queries and keys of a tile, warps, and tiles of keys in shared memory at a time."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """For heads of up to 128 dimensions, of which larger ones take smaller tiles.

    The threshold is the sampled score of this rank, of one key in `sample` or k / 2. scored: candidates that are scored
    at a time; ranked: the logarithm of the queries whose candidates one program ranks.
    """

    threshold: Tiles = Tiles(128, 64, 8, 3)
    hits: Tiles = Tiles(128, 128, 8, 2)
    rank: int = 8
    sample: int = 16
    scored: int = 32
    score_warps: int = 2
    ranked: int = 0
    rank_warps: int = 1


@dataclass(frozen=True)
class Found:
    """ids [m, k] int32, failed [m] bool: those of which nothing is proven; candidates [m] int32: room + 1 for more."""

    ids: Tensor
    failed: Tensor
    candidates: Tensor


def streaming_topk(keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: Beside = None) -> Tensor:
    """The k nearest of keys [n, D] by inner product for queries [m, D], of one floating dtype with contiguous rows,
    free of NaN and infinity.

    Query i sees keys 0 .. visible[i] - 1; visible [m] int32. Scores are float32 sums of products. beside: one more
    dimension of the keys [n] and of the queries [m], float32. Returns ids [m, k] int32, best first, -1 pads; of equal
    scores any. Holds 1 GiB at most beside the lists, a 16-bit copy of float32 keys and a sixteenth of the keys. All
    tensors on one GPU, or on the CPU under Triton's interpreter.
    """
    if not len(keys) or not len(queries):
        return torch.full((len(queries), k), -1, dtype=torch.int32, device=queries.device)
    found = first_try(keys, queries, visible, k, beside)
    again = found.failed.nonzero().flatten()
    # Neighbours see about as many keys: tiles that none of them sees are skipped.
    again = again[visible[again].argsort()]
    for some in again.split(max(_BYTES * CHUNK // (8 * max(len(keys), 1)), 1)):
        asked = None if beside is None else (beside[0], beside[1][some])
        found.ids[some] = chunk_topk(keys, queries[some], visible[some], k, asked)
    return found.ids


def first_try(
    keys: Tensor, queries: Tensor, visible: Tensor, k: int, beside: Beside = None, tuning: Tuning | None = None
) -> Found:
    """What streaming_topk finds by thresholds; see there."""
    m = len(queries)
    search = Search(keys, k, None if beside is None else beside[0], tuning or Tuning())
    ids = torch.empty(m, k, dtype=torch.int32, device=keys.device)
    failed = torch.empty(m, dtype=torch.bool, device=keys.device)
    candidates = torch.empty(m, dtype=torch.int32, device=keys.device)
    for begin in range(0, m, search.rows):
        part = slice(begin, begin + search.rows)
        ask = Asked(search, queries[part], visible[part], None if beside is None else beside[1][part])
        floors = ask.thresholds()
        hits, counts = ask.hits()
        near = ask.expand(hits, counts, candidates[part])
        ranked = hits  # whose room is enough
        ask.scores(near, candidates[part], ranked)
        ask.rank(ranked, candidates[part], floors, ids[part], failed[part])
    return Found(ids, failed, candidates)


class Search:
    """Keys, as 16-bit numbers too, and a sample of them."""

    def __init__(self, keys: Tensor, k: int, beside: Tensor | None, tuning: Tuning) -> None:
        n, dim = keys.shape
        self.keys, self.k, self.beside, self.tuning = keys, k, beside, tuning
        self.half, self.scale, length, rest = _halves(keys)
        self.length, self.rest = length.amax(), rest.amax()
        self.half_beside = None if beside is None else beside * self.scale
        self.furthest = None if self.half_beside is None else self.half_beside.abs().amax()
        self.every = max(tuning.sample, k // 2)
        number = torch.arange(n // self.every, device=keys.device)
        # Every so often one, at places that follow no period.
        self.sample_ids = (number * self.every + number * 40503 % 65536 * self.every // 65536).int()
        self.sampled = self.half[self.sample_ids]
        self.sampled_beside = None if self.half_beside is None else self.half_beside[self.sample_ids]
        self.room = max(512, triton.next_power_of_2(12 * k))
        block_d = max(triton.next_power_of_2(dim), 16)
        self.shape = {"DIM": dim, "BLOCK_D": block_d}
        self.shrink = max(block_d // 128, 1)
        tile = tuning.hits.queries // self.shrink
        self.rows = max(_BYTES // (12 * self.room) // tile, 1) * tile

    def options(self, tiles: Tiles) -> dict[str, Any]:
        """What a kernel with products takes."""
        return {
            "BLOCK_M": max(tiles.queries // self.shrink, 16),
            "BLOCK_N": max(tiles.keys // self.shrink, 32),
            "COMPUTE": _DOTS[self.half.dtype] if self.half.is_cuda else tl.float32,
            "STAGES": tiles.stages,
            "num_warps": max(tiles.warps // self.shrink, 4),
            "num_stages": tiles.stages,
            **self.shape,
        }


class Asked:
    """The steps for some queries [m, D]."""

    def __init__(self, search: Search, queries: Tensor, visible: Tensor, beside: Tensor | None) -> None:
        self.search, self.queries, self.visible, self.beside = search, queries, visible, beside
        self.half, self.scale, self.length, self.rest = _halves(queries)
        self.half_beside = None if beside is None else beside * self.scale

    def _order(self, tile: int) -> Tensor:
        """The numbers of the tiles of queries, those that see most first, so that the last programs are short."""
        seen = torch.nn.functional.pad(self.visible, (0, -len(self.visible) % tile)).view(-1, tile).amax(1)
        return seen.argsort(descending=True).int()

    def thresholds(self) -> Tensor:
        """Sets the thresholds [m] and returns the floors [m]: every key that scores more is found."""
        search, m = self.search, len(self.queries)
        options = search.options(search.tuning.threshold)
        order = self._order(options["BLOCK_M"])
        self.threshold = torch.empty(m, device=self.queries.device)
        with torch.cuda.device_of(self.queries):
            threshold_kernel[(len(order),)](
                self.half, search.sampled, self.half_beside, search.sampled_beside, search.sample_ids, self.visible,
                order, self.threshold, m, len(search.sampled), search.every, search.tuning.rank,
                self.half.stride(0), search.sampled.stride(0), SLOTS=min(64, options["BLOCK_N"]), **options,
            )  # fmt: skip
        slack = self._slack()
        self.threshold -= 2 * slack
        return (self.threshold + slack) / search.scale / self.scale

    def _slack(self) -> Tensor:
        """How much a score [m] of a 16-bit product differs at most from that of chunk_topk or rank: what 16 bits leave
        out, by Cauchy and Schwarz, and the rounding of two sums."""
        search, dim = self.search, self.queries.shape[1]
        longest, length = search.length + search.rest, self.length + self.rest
        slack = self.rest * longest + self.length * search.rest + dim * 2.0**-22 * length * longest
        if self.half_beside is None or search.furthest is None:
            return slack
        return slack + 2.0**-20 * search.furthest * self.half_beside.abs()

    def hits(self) -> tuple[Tensor, Tensor]:
        """See hits_kernel."""
        search, m, device = self.search, len(self.queries), self.queries.device
        options = search.options(search.tuning.hits)
        order = self._order(options["BLOCK_M"])
        hits = torch.empty(m, search.room, dtype=torch.int64, device=device)
        counts = torch.empty(m, LISTS, dtype=torch.int32, device=device)
        with torch.cuda.device_of(self.queries):
            hits_kernel[(len(order),)](
                self.half, search.half, self.half_beside, search.half_beside, self.visible, order, self.threshold,
                hits, counts, m, len(search.half), self.half.stride(0), search.half.stride(0),
                CAPACITY=search.room // LISTS, maxnreg=_registers(options), **options,
            )  # fmt: skip
        return hits, counts

    def expand(self, hits: Tensor, counts: Tensor, totals: Tensor) -> Tensor:
        """Ids [m, room], and writes their numbers to totals [m]; see expand_kernel."""
        search = self.search
        ids = torch.empty(len(hits), search.room, dtype=torch.int32, device=hits.device)
        with torch.cuda.device_of(hits):
            expand_kernel[(len(hits),)](
                hits, counts, ids, totals, BLOCK_N=search.options(search.tuning.hits)["BLOCK_N"],
                CAPACITY=search.room // LISTS, ROOM=search.room, num_warps=4,
            )  # fmt: skip
        return ids

    def scores(self, ids: Tensor, totals: Tensor, ranked: Tensor) -> None:
        """Writes ranked [m, room]; see score_kernel."""
        search = self.search
        with torch.cuda.device_of(ids):
            score_kernel[(len(ids),)](
                self.queries, search.keys, self.beside, search.beside, ids, totals, ranked,
                self.queries.stride(0), search.keys.stride(0), BLOCK_C=search.tuning.scored, ROOM=search.room,
                num_warps=search.tuning.score_warps, **search.shape,
            )  # fmt: skip

    def rank(self, ranked: Tensor, totals: Tensor, floors: Tensor, out: Tensor, failed: Tensor) -> None:
        """Writes lists [m, k] and failed [m]; see rank_kernel."""
        search, m = self.search, len(ranked)
        width = max((search.k - 1).bit_length(), 4)
        # The interpreter takes its time for every program.
        block = search.tuning.ranked if ranked.is_cuda else 6
        with torch.cuda.device_of(ranked):
            rank_kernel[(triton.cdiv(m, 1 << block),)](
                ranked, totals, floors, out, failed, m, search.k,
                LOG_Q=block, LOG_C=max(width, 7), LOG_K=width, ROOM=search.room, num_warps=search.tuning.rank_warps,
            )  # fmt: skip


def _registers(options: dict[str, Any]) -> int:
    """Of a thread: as many as let two programs run on a multiprocessor at a time where the products leave room."""
    threads = 32 * options["num_warps"]
    products = options["BLOCK_M"] * options["BLOCK_N"] // threads
    return min(65536 // threads // (2 if products <= 64 else 1), 255)


def _halves(states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States [n, D] in 16 bits, the factor by which they grew, their lengths [n] then, and those of what was lost."""
    if states.dtype in _DOTS:
        lengths = torch.linalg.vector_norm(states, dim=1, dtype=torch.float32)
        return states, torch.ones((), device=states.device), lengths, torch.zeros_like(lengths)
    most = torch.linalg.vector_norm(states.flatten(), float("inf")).clamp(min=_LEAST)
    scale = torch.exp2(_EXPONENT - most.log2().floor())
    grown = states * scale
    half = grown.half()
    lengths = torch.linalg.vector_norm(half, dim=1, dtype=torch.float32)
    return half, scale, lengths, torch.linalg.vector_norm(grown.sub_(half), dim=1)
