"""The clusters read last, kept on the GPU beside a wave index whose members lie in CPU memory (RetroInfer)."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_hub import WeightedPart, copy_rows

from .wave_index import WaveIndex, expand_runs

PAGE = 8


class ClusterCache:
    """Pages of 8 rows of the members of one layer's clusters, least recently used out first, for each kv head.

    A cluster takes ceil(size / 8) pages. One step: `parts` says where the members of the retrieved clusters lie, in a
    page or in the index's store; after the attention `admit` takes in the pages that were missing, the best clusters'
    first, but for none that the same step read. All bookkeeping is done by tensor operations on the index's device,
    for all rows at once. pages: of every sequence and kv head.
    """

    def __init__(self, index: WaveIndex, pages: int) -> None:
        rows, device = index.sizes.shape[:2], index.sizes.device
        shape = (*rows, pages * PAGE, index.keys.shape[3])
        self.index, self.pages = index, pages
        self.keys, self.values = (torch.zeros(shape, dtype=index.keys.dtype, device=device) for _ in range(2))
        self._step = 0
        # No row has more pages than this; the last entry of each table takes what is written nowhere.
        most = index.keys.shape[2] // PAGE + index.sizes.shape[2]
        self._slot_of = torch.full((*rows, most + 1), -1, dtype=torch.int64, device=device)
        self._page_in = torch.full((*rows, pages + 1), most, dtype=torch.int64, device=device)
        self._used = torch.zeros((*rows, pages + 1), dtype=torch.int64, device=device)
        self._missing: tuple[Tensor, Tensor] | None = None
        self.refresh()

    @staticmethod
    def expected_bytes(rows: int, members: int, clusters: int, pages: int, row_bytes: int) -> int:
        """For `members` in so many clusters in each of B * Hkv rows; row_bytes: of a member's key, or value."""
        tables = members // PAGE + clusters + 1 + 2 * (pages + 1) + clusters
        return rows * (2 * pages * PAGE * row_bytes + 8 * tables + 4 * clusters)

    def refresh(self) -> None:
        """Takes notice of clusters added to the index; those that it had before keep their pages."""
        self._page_counts = (self.index.sizes + PAGE - 1) // PAGE
        self._first_pages = self._page_counts.cumsum(2) - self._page_counts

    def parts(self, clusters: Tensor) -> tuple[list[WeightedPart], int]:
        """The members of clusters [B, Hkv, P] (-1 pads): what the pages hold, what the store does; and how many tokens
        of it the store does."""
        at = clusters.clamp(min=0)
        which, place = expand_runs(self._page_counts.gather(2, at).masked_fill(clusters < 0, 0))
        wanted, cluster = which >= 0, at.gather(2, which.clamp(min=0))
        nowhere = self._slot_of.shape[2] - 1
        pages = torch.where(wanted, self._first_pages.gather(2, cluster) + place, nowhere)
        slots = self._slot_of.gather(2, pages)
        hit = slots >= 0
        self._step += 1
        self._used.scatter_(2, torch.where(hit, slots, self.pages), self._step)

        offset = torch.arange(PAGE, device=clusters.device)
        inside = (place * PAGE)[..., None] + offset < self.index.sizes.gather(2, cluster)[..., None]
        inside &= wanted[..., None]
        in_store = (self.index.first_rows.gather(2, cluster) + place * PAGE)[..., None] + offset
        in_pages = (slots * PAGE)[..., None] + offset
        hits = torch.where(inside & hit[..., None], in_pages, -1).flatten(2)
        misses = torch.where(inside & ~hit[..., None], in_store, -1).flatten(2)
        self._missing = torch.where(hit, nowhere, pages), misses
        parts = [WeightedPart(self.keys, self.values, hits), self.index.retrieved_part(misses)]
        return parts, int((misses >= 0).sum())

    def admit(self) -> None:
        """Copies the pages that the last `parts` missed in place of those not used for longest."""
        if self._missing is None:
            return
        (pages, rows), self._missing = self._missing, None
        nowhere = self._slot_of.shape[2] - 1
        missing = pages < nowhere
        rank = missing.cumsum(2) - 1
        used = self._used[..., : self.pages]
        oldest = used.argsort(dim=2, stable=True)
        free = (used < self._step).sum(2, keepdim=True)
        taken = missing & (rank < free)
        slots = torch.where(taken, oldest.gather(2, rank.clamp(0, self.pages - 1)), self.pages)
        pages = torch.where(taken, pages, nowhere)
        self._slot_of.scatter_(2, self._page_in.gather(2, slots), -1)
        self._slot_of.scatter_(2, pages, torch.where(taken, slots, -1))
        self._page_in.scatter_(2, slots, pages)
        self._used.scatter_(2, slots, self._step)
        offset = torch.arange(PAGE, device=slots.device)
        places = torch.where(taken[..., None], (slots * PAGE)[..., None] + offset, -1).flatten(2)
        for store, buffer in ((self.index.keys, self.keys), (self.index.values, self.values)):
            copy_rows(store, buffer, rows, places)

    @property
    def nbytes(self) -> int:
        tables = (self._slot_of, self._page_in, self._used, self._page_counts, self._first_pages)
        return sum(t.nbytes for t in (self.keys, self.values, *tables))
