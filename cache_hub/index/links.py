"""The links of a graph in 16 bits each, however many keys there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pinned import huge_empty
from . import _native
from .tensor_file import check_ids

_SEGMENT = 1 << 16


@dataclass(frozen=True)
class PackedLinks:
    """Links of the keys of R rows in `slots` places each, data [R, N, slots], as csrc/links.h lays them out.

    segments 0: int32, where the other layouts do not fit. 1: uint16, up to 65,535 keys. From 2 on: uint16, of which
    ceil(segments / 2) places count how many links lead into each 65,536 keys; the others are links.
    """

    data: Tensor
    segments: int

    @property
    def slots(self) -> int:
        return self.data.shape[2]

    @staticmethod
    def capacity(keys: int, slots: int) -> int:
        """Links that a key can have among `keys` of them."""
        segments = _segments(keys, slots)
        return slots - (segments + 1) // 2 if segments > 1 else slots

    @staticmethod
    def expected_bytes(keys: int, slots: int) -> int:
        """Of the links of one row."""
        return keys * slots * (2 if _segments(keys, slots) else 4)

    @classmethod
    def pack(cls, links: Tensor, slots: int, num_threads: int = 1) -> PackedLinks:
        """From links [R, N, capacity] int32 on the CPU, contiguous, -1 pads at the end; kept as they are where nothing
        is to be gained."""
        segments = _segments(links.shape[1], slots)
        return cls(cls._laid_out(links, slots, segments, num_threads), segments)

    @staticmethod
    def _laid_out(links: Tensor, slots: int, segments: int, num_threads: int = 1) -> Tensor:
        if segments == 0:
            return links
        rows, keys, width = links.shape
        data = huge_empty((rows, keys, slots), torch.uint16)
        _native.pack_links(links.data_ptr(), rows * keys, width, segments, slots, num_threads, data.data_ptr())
        return data

    def grown(self, keys: int) -> PackedLinks:
        """A copy with rows for `keys` of them, of which the new ones are not written. Where that changes the layout, a
        row with more links than then fit loses its last."""
        rows, before, slots = self.data.shape
        data, segments = self.data, _segments(keys, slots)
        if segments != self.segments:
            links = self.unpack()[..., : self.capacity(keys, slots)].contiguous()
            data = self._laid_out(links, slots, segments)
        return PackedLinks(torch.cat((data, data.new_empty(rows, keys - before, slots)), 1), segments)

    @classmethod
    def checked(cls, data: Tensor, slots: int) -> PackedLinks:
        """Data as `pack` made them for so many slots. ValueError where they are not, or lead to keys that are not
        there, which the native code would not notice."""
        rows, keys = data.shape[:2]
        segments = _segments(keys, slots)
        width = slots if segments else cls.capacity(keys, slots)
        shape = (rows, keys, width)
        if data.shape != shape or data.dtype != (torch.uint16 if segments else torch.int32):
            raise ValueError(f"links: got {data.dtype} {list(data.shape)}, allowed: {list(shape)} of {slots} places")
        places = (segments + 1) // 2
        for row in range(rows):
            one = cls(data[row : row + 1], segments)
            if segments > 1:
                counts = one.data[..., :places].contiguous().view(torch.uint8)[..., :segments]
                if int(counts.sum(-1, dtype=torch.int32).max()) > slots - places:
                    raise ValueError(f"links: got more than {slots - places} of a key, in the counts of its segments")
            check_ids(one.unpack(), "links", keys)
        return cls(data, segments)

    def unpack(self) -> Tensor:
        """[R, N, slots] int32 with -1 pads at the end; from 2 segments on in the order of the segments."""
        out = torch.empty(self.data.shape, dtype=torch.int32)
        rows, keys, slots = out.shape
        _native.unpack_links(self.data.data_ptr(), rows * keys, slots, self.segments, out.data_ptr())
        return out


def _segments(keys: int, slots: int) -> int:
    """Of the layout for so many keys: 0 where the counts would take more than a quarter of the places, or not fit."""
    if keys < _SEGMENT:
        return 1
    segments = max(-(-keys // _SEGMENT), 2)  # 65,535 is a key of the first
    return segments if 4 * ((segments + 1) // 2) <= slots <= 255 else 0
