"""Keys in 8 bits, laid out cluster by cluster: those of the clusters that a query chooses lie side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from .device_keys import DeviceKeys

# Wanted where all clusters are.
ALL = 1 << 30


class ClusteredKeys(DeviceKeys):
    """DeviceKeys of which each cluster's lie side by side, once `arrange` was called for all of them.

    tokens [B, Hkv, N] int32: the token of each key, counted as they came. starts [B, Hkv, C + 1] int32: cluster c are
    the keys starts[c] to starts[c + 1] - 1, none behind the last cluster; C is `clusters`, the room for them. wanted
    [B, Hkv] int32: clusters that a query head asks for, ALL for all of them. None of them ever moves. clustered: how
    many clusters the sequences have.
    """

    def __init__(self, batch: int, kv_heads: int, room: int, dim: int, clusters: int, device: torch.device) -> None:
        super().__init__(batch, kv_heads, room, dim, device)
        self.tokens = torch.zeros(self.scales.shape, dtype=torch.int32, device=device)
        self.starts = torch.zeros(batch, kv_heads, clusters + 1, dtype=torch.int32, device=device)
        self.wanted = torch.zeros(batch, kv_heads, dtype=torch.int32, device=device)
        self.clustered = [0] * batch

    def put(self, sequences: slice, keys: Tensor) -> None:
        """See DeviceKeys. The sequences then have no clusters."""
        super().put(sequences, keys)
        self.clustered[sequences] = [0] * len(keys)

    def arrange(self, sequences: slice, assignment: Tensor, clusters: int) -> None:
        """Orders the keys that came last by their clusters, assignment [b, Hkv, T] of any integer type on any device,
        of the last T; all these are behind the clusters of the keys before them, below `clusters`.

        Raises ValueError where there is no room for so many, or keys before them have no cluster yet.
        """
        total, tokens = self.counts[sequences][0], assignment.shape[2]
        first, before, room = total - tokens, self.clustered[sequences][0], self.starts.shape[2] - 1
        if clusters > room:
            raise ValueError(f"clusters: got {clusters}, allowed: at most {room}, the room that was made")
        if (first > 0) != (before > 0):
            raise ValueError(f"assignment: got one of {tokens} keys, allowed: of all {total}, of which none has any")
        ordered, order = assignment.to(self.codes.device, torch.int32).sort(dim=2, stable=True)
        self.tokens[sequences, :, first:total] = first + order
        bounds = torch.arange(before, clusters, dtype=torch.int32, device=ordered.device)
        begins = torch.searchsorted(ordered, bounds.expand(*ordered.shape[:2], -1).contiguous(), out_int32=True)
        self.starts[sequences, :, before:clusters] = first + begins
        self.starts[sequences, :, clusters:] = total
        for table in (self.codes[sequences, :, first:total], self.scales[sequences, :, first:total]):
            for part, rows in zip(table.unbind(0), order, strict=True):
                for own, places in zip(part, rows, strict=True):
                    own.copy_(own[places])
        self.clustered[sequences] = [clusters] * len(assignment)

    def want(self, share: float, least: int) -> None:
        """Lets query heads ask for a share of each sequence's clusters, but for at least so many."""
        wanted = [max(round(share * clusters), least) for clusters in self.clustered]
        wanted = [
            ALL if number >= clusters else number for number, clusters in zip(wanted, self.clustered, strict=True)
        ]
        self.wanted.copy_(torch.tensor(wanted, dtype=torch.int32)[:, None].expand_as(self.wanted))

    @staticmethod
    def order_bytes(rows: int, room: int, clusters: int) -> int:
        """What B * Hkv rows take beyond `expected_bytes`."""
        return DeviceKeys.expected_bytes(rows, room, 0) + 4 * rows * (clusters + 2)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.tokens.nbytes + self.starts.nbytes + self.wanted.nbytes
