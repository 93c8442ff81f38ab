"""WeightedPart: the rows of one KV store that a decode query attends to, each with its weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int32, torch.int64)


@dataclass
class WeightedPart:
    """Rows j of one store, each counted exp(w_j) times in the softmax of a decode query.

    A token has w_j = 0. A row that stands for a cluster of s tokens has w_j = log(s), the centroid as key and
    value_sum / s as value. A weight of -inf removes its row, whose value must still be finite. A token attended to
    exactly whose cluster stands in another part is taken off that cluster by its stand-in, the centroid c: it counts
    exp(w_j + s q.k_j) - exp(s q.c_j) times, which is the same sum as if the cluster had never held it.

    keys, values: [B, Hkv, N, D] float32, bfloat16 or float16 with contiguous rows (any stride between them), on the
        query's device or, for a CUDA query, in pinned host memory.
    ids: [B, Hkv, T] (one list per kv head) or [B, H, T] (one per query head), int32 or int64, -1 pads, lying where
        keys may; None attends to the first `lengths` rows.
    log_weights: w, broadcastable to [B, H, T], or with Hkv in place of H, lying where keys may; None is 0. T is N where
        ids is None.
    lengths: [B, Hkv] int32 or int64, valid rows where ids is None; None is N.
    stand_ins, stand_in_ids: centroids [B, Hkv, C, D] in the keys' dtype on the query's device, and which of them each
        of ids stands in for, like ids (-1: none); both or neither.
    """

    keys: Tensor
    values: Tensor
    ids: Tensor | None = None
    log_weights: Tensor | None = None
    lengths: Tensor | None = None
    stand_ins: Tensor | None = None
    stand_in_ids: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """T: entries of each id list, or N where ids is None."""
        return self.keys.shape[2] if self.ids is None else self.ids.shape[2]

    def check(self, query: Tensor) -> None:
        """Raise ValueError or TypeError where a field does not fit query [B, 1, H, D]. Does not read any data."""
        check_query(query)
        batch, _, heads, head_dim = query.shape
        keys, values = self.keys, self.values
        if keys.dim() != 4 or keys.shape[0] != batch or keys.shape[3] != head_dim:
            raise ValueError(f"keys are {_shape(keys)}, must be [B={batch}, Hkv, N, D={head_dim}] as the query's")
        if values.shape != keys.shape:
            raise ValueError(f"values are {_shape(values)}, must have the keys' shape {_shape(keys)}")
        kv_heads = keys.shape[1]
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
        if keys.dtype not in FLOAT_DTYPES or values.dtype != keys.dtype:
            raise TypeError(f"keys are {keys.dtype}, values {values.dtype}; both must be one of {_names(FLOAT_DTYPES)}")
        for name, store in (("keys", keys), ("values", values)):
            if store.stride(3) != 1 and head_dim > 1:
                raise ValueError(f"{name} have stride {store.stride(3)} in the last dimension, must be 1")
            if store.device != query.device and not _pinned(store, query):
                raise ValueError(f"{name} are on {store.device}, must be on {query.device} or, for CUDA, be pinned")
        self._check_ids(query, kv_heads)
        self._check_log_weights(query, kv_heads)
        self._check_lengths(query, kv_heads)
        self._check_stand_ins(query)

    def _check_ids(self, query: Tensor, kv_heads: int) -> None:
        if self.ids is None:
            return
        batch, heads = query.shape[0], query.shape[2]
        _check_integer("ids", self.ids, query, host=True)
        if self.ids.dim() != 3 or self.ids.shape[0] != batch or self.ids.shape[1] not in (kv_heads, heads):
            raise ValueError(f"ids are {_shape(self.ids)}, must be [{batch}, {kv_heads}, T] or [{batch}, {heads}, T]")

    def _check_log_weights(self, query: Tensor, kv_heads: int) -> None:
        weights = self.log_weights
        if weights is None:
            return
        batch, heads, rows = query.shape[0], query.shape[2], self.num_rows
        if not weights.is_floating_point() or (weights.device != query.device and not _pinned(weights, query)):
            where = f"{query.device} or pinned" if query.is_cuda else str(query.device)
            raise TypeError(f"log_weights are {weights.dtype} on {weights.device}, must be floating on {where}")
        padded = (1,) * (3 - weights.dim()) + tuple(weights.shape)
        allowed = ((1, batch), (1, kv_heads, heads), (1, rows))
        if len(padded) != 3 or any(n not in sizes for n, sizes in zip(padded, allowed, strict=True)):
            raise ValueError(
                f"log_weights are {_shape(weights)}, must broadcast to [{batch}, {heads}, {rows}] "
                f"or [{batch}, {kv_heads}, {rows}]"
            )

    def _check_lengths(self, query: Tensor, kv_heads: int) -> None:
        if self.lengths is None:
            return
        if self.ids is not None:
            raise ValueError("lengths and ids are both given; lengths only counts rows where ids is None (pad with -1)")
        _check_integer("lengths", self.lengths, query)
        if tuple(self.lengths.shape) != (query.shape[0], kv_heads):
            raise ValueError(f"lengths are {_shape(self.lengths)}, must be [{query.shape[0]}, {kv_heads}]")

    def _check_stand_ins(self, query: Tensor) -> None:
        rows, ids = self.stand_ins, self.stand_in_ids
        if rows is None and ids is None:
            return
        if rows is None or ids is None or self.ids is None:
            raise ValueError("stand_ins and stand_in_ids must both be given, and only with ids")
        _check_integer("stand_in_ids", ids, query, host=True)
        if ids.shape != self.ids.shape:
            raise ValueError(f"stand_in_ids are {_shape(ids)}, must be {_shape(self.ids)} as ids")
        keys = self.keys
        if rows.dim() != 4 or rows.shape[:2] != keys.shape[:2] or rows.shape[3] != keys.shape[3]:
            raise ValueError(f"stand_ins are {_shape(rows)}, must be {_shape(keys)} as keys, but for the third")
        if rows.dtype != keys.dtype or rows.device != query.device or rows.stride(3) != 1:
            raise ValueError(
                f"stand_ins are {rows.dtype} on {rows.device} with strides {rows.stride()}, must be {keys.dtype} on "
                f"{query.device} with contiguous rows"
            )

    def grouped_log_weights(self, num_heads: int) -> Tensor | None:
        """log_weights as a [B, Hkv, g, T] view whose broadcast dimensions have stride 0, or None."""
        if self.log_weights is None:
            return None
        batch, kv_heads = self.keys.shape[:2]
        group = num_heads // kv_heads
        weights = self.log_weights[(None,) * (3 - self.log_weights.dim())]
        weights = weights.unflatten(1, (kv_heads, group)) if weights.shape[1] == num_heads else weights.unsqueeze(2)
        return weights.expand(batch, kv_heads, group, self.num_rows)


def check_query(query: Tensor) -> None:
    """Raise where query is not a floating [B, 1, H, D]."""
    if query.dim() != 4 or query.shape[1] != 1:
        raise ValueError(f"query is {_shape(query)}, must be [B, 1, H, D]")
    if query.dtype not in FLOAT_DTYPES:
        raise TypeError(f"query is {query.dtype}, must be one of {_names(FLOAT_DTYPES)}")


def check_parts(query: Tensor, parts: Sequence[WeightedPart]) -> None:
    """Raise where there is no part or one does not fit query [B, 1, H, D]; the message names the part."""
    if not parts:
        raise ValueError("parts is empty, must hold at least one WeightedPart")
    for i, part in enumerate(parts):
        try:
            part.check(query)
        except (ValueError, TypeError) as error:
            raise type(error)(f"part {i}: {error}") from None


def _check_integer(name: str, tensor: Tensor, query: Tensor, host: bool = False) -> None:
    there = tensor.device == query.device or (host and _pinned(tensor, query))
    if tensor.dtype not in ID_DTYPES or not there:
        where = f"{query.device} or pinned" if host and query.is_cuda else str(query.device)
        raise TypeError(f"{name} are {tensor.dtype} on {tensor.device}, must be int32 or int64 on {where}")


def _pinned(tensor: Tensor, query: Tensor) -> bool:
    return query.is_cuda and tensor.device.type == "cpu" and tensor.is_pinned()


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
