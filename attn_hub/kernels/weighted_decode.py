"""Weighted decode attention by Triton kernels: split-K flash-decoding over rows gathered by id, then one merge.

Source: the split and merge of flash-decoding with the partial softmaxes of RetrievalAttention (arXiv 2409.10516)
appendix B.1; additive log weights as in RetroInfer (arXiv 2505.02922). Rows and ids are read where they lie, in GPU
memory or in pinned host memory, once for all query heads that attend to them.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_hub.kernels.weighted_rows import attend_pair_kernel, attend_rows_kernel, merge_splits_kernel
from attn_hub.parts import WeightedPart, check_parts

# Programs started per multiprocessor, so that enough row reads are in flight to fill the memory's bandwidth.
_PROGRAMS_PER_SM, _HOST_PROGRAMS_PER_SM = 2, 16
_MERGE_BLOCK = 32


class TritonSplits:
    """Weighted decode attention by the kernels in steps: CUDA tensors and pinned stores, or Triton's interpreter.

    Of the parts attended to together, two share a launch where they are read alike: from the same kind of memory, by as
    many lists, with one type of products. A launch reads rows and ids as they are then. One more launch merges; no
    synchronisation with the host, so that all can be captured in CUDA graphs. Arguments as those of
    `attn_hub.weighted_decode_attention`.
    """

    def __init__(self, query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None) -> None:
        check_parts(query, parts)
        batch, _, heads, head_dim = query.shape
        self.parts, self._attended = parts, 0
        self._query = query if query.stride(3) == 1 else query.contiguous()
        self._scale = head_dim**-0.5 if scale is None else scale
        splits = [_num_splits(query, part) for part in parts]
        self._first = list(itertools.accumulate(splits, initial=0))
        sizes = (self._first[-1], batch * heads)
        self._out = torch.empty(*sizes, head_dim, dtype=torch.float32, device=query.device)
        self._sum, self._max = (torch.empty(sizes, dtype=torch.float32, device=query.device) for _ in range(2))

    def attend(self, stop: int) -> None:
        """Reads the rows of the parts before `stop` that were not attended to yet."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for number in range(self._attended, stop):
            if self._first[number] < self._first[number + 1]:
                alike.setdefault(_how_read(self._query, self.parts[number]), []).append(number)
        with torch.cuda.device_of(self._query):
            for numbers in alike.values():
                for begin in range(0, len(numbers), 2):
                    self._launch(numbers[begin : begin + 2])
        self._attended = max(self._attended, stop)

    def merge(self) -> Tensor:
        """[B, 1, H, D] over all parts."""
        self.attend(len(self.parts))
        query = self._query
        head_dim = query.shape[3]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        with torch.cuda.device_of(query):
            merge_splits_kernel[(self._out.shape[1],)](
                self._out, self._sum, self._max, out, self._first[-1],
                HEAD_DIM=head_dim, BLOCK_S=_MERGE_BLOCK, BLOCK_D=_block_dim(head_dim),
            )  # fmt: skip
        return out

    def _launch(self, numbers: Sequence[int]) -> None:
        """Attends to one part or two, which are read alike."""
        query, part = self._query, self.parts[numbers[0]]
        batch, _, heads, head_dim = query.shape
        kv_heads, lists = part.keys.shape[1], _num_lists(part)
        num_splits = sum(self._first[number + 1] - self._first[number] for number in numbers)
        kernel = attend_rows_kernel if len(numbers) == 1 else attend_pair_kernel
        kernel[(batch * lists, num_splits)](
            query, query.stride(0), query.stride(2), self._out, self._sum, self._max, self._scale, kv_heads,
            *itertools.chain.from_iterable(map(self._arguments, numbers)),
            HEAD_DIM=head_dim, HEADS_PER_LIST=heads // lists, LISTS_PER_KV_HEAD=lists // kv_heads,
            BLOCK_H=max(16, triton.next_power_of_2(heads // lists)),
            BLOCK_D=_block_dim(head_dim), COMPUTE=_dot_dtype(query, part.keys), **_tile(part),
        )  # fmt: skip

    def _arguments(self, number: int) -> tuple[Tensor | int | None, ...]:
        """The kernels' arguments for a part."""
        part, (first, end) = self.parts[number], self._first[number : number + 2]
        weights = part.grouped_log_weights(self._query.shape[2])
        return (
            part.keys, part.values, part.ids, weights, part.lengths, part.stand_ins, part.stand_in_ids,
            part.num_rows, end - first, first,
            *_strides(part.keys, 3),
            *_strides(part.values, 3),
            *_strides(part.ids, 3),
            *_strides(weights, 4),
            *_strides(part.lengths, 2),
            *_strides(part.stand_ins, 3),
            *_strides(part.stand_in_ids, 3),
        )  # fmt: skip


def triton_weighted_decode_attention(
    query: Tensor, parts: Sequence[WeightedPart], scale: float | None = None
) -> Tensor:
    """`attn_hub.weighted_decode_attention` by the kernels."""
    return TritonSplits(query, parts, scale).merge()


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return tensor.stride()[:count] if tensor is not None else (0,) * count


def _block_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _dot_dtype(query: Tensor, keys: Tensor) -> tl.dtype:
    """The common dtype of query and keys, float32 if they differ; Triton's interpreter cannot multiply bfloat16."""
    if query.dtype != keys.dtype or query.device.type == "cpu":
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[query.dtype]


def _how_read(query: Tensor, part: WeightedPart) -> tuple[object, ...]:
    """What parts of one launch have in common."""
    lists = part.keys.shape[1], _num_lists(part)
    return (*lists, part.keys.device.type, _dot_dtype(query, part.keys), *_tile(part).values())


def _num_lists(part: WeightedPart) -> int:
    return part.keys.shape[1] if part.ids is None else part.ids.shape[1]


def _reads_host(part: WeightedPart) -> bool:
    return part.ids is not None and part.keys.device.type == "cpu" and part.keys.is_pinned()


def _tile(part: WeightedPart) -> dict[str, int]:
    """How a program reads. GPU memory: at most 16 KiB of keys at a time, so that three stages fit any GPU's shared
    memory; host memory: few rows by many small programs, as each waits long for its own. Both measured on an H100."""
    if _reads_host(part):
        return {"BLOCK_N": 16, "num_warps": 1, "num_stages": 1}
    row_bytes = part.keys.shape[3] * part.keys.element_size()
    return {"BLOCK_N": 64 if row_bytes <= 256 else 32, "num_warps": 4, "num_stages": 3}


def _num_splits(query: Tensor, part: WeightedPart) -> int:
    """Programs per id list: each has a block of rows at least, and together they fill the device."""
    lists = query.shape[0] * _num_lists(part)
    each = _HOST_PROGRAMS_PER_SM if _reads_host(part) else _PROGRAMS_PER_SM
    programs = each * _multiprocessors(query.device)
    return min(triton.cdiv(part.num_rows, _tile(part)["BLOCK_N"]), triton.cdiv(programs, lists))


def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 for Triton's interpreter, so that small tests have several splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
