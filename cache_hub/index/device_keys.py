"""Keys in 8 bits where a layer computes, of all sequences of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens: no copy in float32 is of more at a time.
_CODED_AT_ONCE = 1 << 14
# What the room for keys is a multiple of: the largest tile of scan_kernel.
ROOM_STEP = 256


class DeviceKeys:
    """As CompactKeys, on a device, with room: key i is about scales[.., i] * codes[.., i] + means.

    codes [B, Hkv, N, D] int8, scales [B, Hkv, N] and means [B, Hkv, D] float32, lengths [B, Hkv] int32 of the keys that
    are there, 0 at first; N is `room`, rounded up. None of them ever moves. counts: of each sequence's keys.
    """

    def __init__(self, batch: int, kv_heads: int, room: int, dim: int, device: torch.device) -> None:
        n = -(-room // ROOM_STEP) * ROOM_STEP
        self.codes = torch.zeros(batch, kv_heads, n, dim, dtype=torch.int8, device=device)
        self.scales = torch.zeros(batch, kv_heads, n, device=device)
        self.means = torch.zeros(batch, kv_heads, dim, device=device)
        self.lengths = torch.zeros(batch, kv_heads, dtype=torch.int32, device=device)
        self.counts = [0] * batch

    def put(self, sequences: slice, keys: Tensor) -> None:
        """Replaces what the sequences hold by keys [b, Hkv, T, D] of any float type, on any device."""
        parts = [part.to(self.codes.device).sum(2, dtype=torch.float32) for part in keys.split(_CODED_AT_ONCE, 2)]
        self.means[sequences] = torch.stack(parts).sum(0) / keys.shape[2]
        self.counts[sequences] = [0] * len(keys)
        self.grow(sequences, keys)

    def grow(self, sequences: slice, keys: Tensor) -> None:
        """Adds keys as those of `put`, behind those of sequences that hold equally many. The means stay, so that scores
        remain comparable. Raises ValueError where there is no room."""
        first, room = self.counts[sequences][0], self.codes.shape[2]
        total = first + keys.shape[2]
        if total > room:
            raise ValueError(f"keys: got {total}, allowed: at most {room}, the room that was made")
        for begin in range(0, keys.shape[2], _CODED_AT_ONCE):
            part = keys[:, :, begin : begin + _CODED_AT_ONCE].to(self.codes.device)
            centred = part.float() - self.means[sequences, :, None]
            scales = centred.abs().amax(3) / 127
            at = slice(first + begin, first + begin + part.shape[2])
            # A key that is the mean has the scale 0, and codes of 0.
            least = torch.finfo(torch.float32).tiny
            self.codes[sequences, :, at] = centred.div_(scales.clamp(min=least)[..., None]).round_().to(torch.int8)
            self.scales[sequences, :, at] = scales
        self.lengths[sequences] = total
        self.counts[sequences] = [total] * len(keys)

    @staticmethod
    def expected_bytes(rows: int, room: int, dim: int) -> int:
        """Of B * Hkv rows with so much room."""
        return rows * -(-room // ROOM_STEP) * ROOM_STEP * (dim + 4)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.means.nbytes
