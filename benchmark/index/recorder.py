"""Full attention that writes down the states it is given, as trace files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_hub import FullCache
from model_hub import LLM
from model_hub.layers import DecoderLayer

from .traces import PREDICTED, file_name

PART = ".part"


class RecordingCache(FullCache):
    """Writes the prompt's states layer by layer as they come, the decode queries and the predicted ones at the end
    (`finish`).

    wanted: the (layer, kv head) to record. Until `finish` a file ends in .npz.part, so that one with its name is whole.
    Beside the cache itself, one layer's states in float16, the decode and the predicted queries are held. One sequence.
    """

    def __init__(self, *, folder: Path, wanted: Collection[tuple[int, int]], **common: Any) -> None:
        super().__init__(**common)
        self.folder = folder
        self.wanted = sorted(wanted)
        self._asked: dict[int, list[Tensor]] = {layer: [] for layer, _ in self.wanted}
        self._predicted: dict[int, list[Tensor]] = {}

    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, start_bdx: int) -> None:
        """Raises ValueError, naming layer and head, for a state that float16 cannot hold."""
        super().store_prompt(q, k, v, layer_idx, start_bdx)
        for head in [head for layer, head in self.wanted if layer == layer_idx]:
            where = f"layer {layer_idx}, kv head {head}"
            group = slice(head * self.group_size, (head + 1) * self.group_size)
            arrays: dict[str, Any] = {
                "q": as_float16(q[0, :, group].transpose(0, 1), f"queries of {where}"),
                "k": as_float16(k[0, :, head], f"keys of {where}"),
                "v": as_float16(v[0, :, head], f"values of {where}"),
            }
            with open(self._part(layer_idx, head), "wb") as file:
                np.savez(file, **arrays)

    def compute(self, query_states: Tensor, layer_idx: int, foreseen: bool = False) -> Tensor:
        if layer_idx in self._asked:
            self._asked[layer_idx].append(query_states[0, 0].cpu())
        return super().compute(query_states, layer_idx, foreseen)

    def predict(self, predicted: Tensor, layer_idx: int) -> None:
        """Takes predicted queries [1, L, H, D] of a layer: of the prompt's end first, then of every decode step."""
        self._predicted.setdefault(layer_idx, []).append(predicted[0].cpu())

    def finish(self) -> None:
        """Adds the decode queries, and the predicted ones where there are any, to every file and gives it its name."""
        for layer, head in self.wanted:
            group = slice(head * self.group_size, (head + 1) * self.group_size)
            asked = [states[group] for states in self._asked[layer]]
            queries = torch.stack(asked, 1) if asked else torch.zeros(self.group_size, 0, self.head_dim)
            where = f"of layer {layer}, kv head {head}"
            arrays = {"q_decode": as_float16(queries, f"decode queries {where}")}
            if layer in self._predicted:
                predicted = torch.cat(self._predicted[layer])[:, group].transpose(0, 1)
                arrays["q_predicted"] = as_float16(predicted, f"predicted queries {where}")
            part = self._part(layer, head)
            with zipfile.ZipFile(part, "a") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
            os.replace(part, part.with_suffix(""))

    def _part(self, layer: int, head: int) -> Path:
        return self.folder / (file_name(layer, head) + PART)


class WatchedLayer(DecoderLayer):
    """A decoder layer that tells what `following`, the layer behind it, predicts its queries to be of what enters this
    one: of a prompt's last PREDICTED tokens, and of every decode step. tell: is given the predictions [b, L, H, D]."""

    __slots__ = ("following", "tell", "watched")
    watched: DecoderLayer
    following: DecoderLayer
    tell: Callable[[Tensor], None]

    @classmethod
    def of(cls, watched: DecoderLayer, following: DecoderLayer, tell: Callable[[Tensor], None]) -> WatchedLayer:
        made = cls(*(getattr(watched, one.name) for one in fields(watched)))
        made.watched, made.following, made.tell = watched, following, tell
        return made

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._predict(hidden, cos, sin)
        return self.watched.project(hidden, cos, sin)

    def project_prompt(self, hidden: Tensor, cos: Tensor, sin: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        self._predict(*(states[:, -PREDICTED:] for states in (hidden, cos, sin)))
        return self.watched.project_prompt(hidden, cos, sin, chunk)

    def _predict(self, *states: Tensor) -> None:
        hidden, cos, sin = (one.to(self.following.device) for one in states)
        with torch.cuda.device_of(hidden):
            self.tell(self.following.predict_query(hidden, cos, sin))


def as_float16(states: Tensor, what: str) -> np.ndarray:
    """States as float16. Raises ValueError where one is NaN or above float16's largest, 65504."""
    half = states.half()
    if not torch.isfinite(half).all():
        largest = states.abs().max().item()
        raise ValueError(f"{what}: got {largest:g}, allowed: up to 65504, as traces are float16")
    return np.ascontiguousarray(half.cpu().numpy())


@torch.inference_mode()
def record_states(
    llm: LLM, ids: list[int], decode_tokens: int, folder: Path, wanted: list[tuple[int, int]]
) -> tuple[RecordingCache, list[int]]:
    """The cache with everything recorded, and the tokens whose queries those of the decode steps are."""
    spec = llm.spec
    cache = RecordingCache(
        folder=folder,
        wanted=wanted,
        layer_num=spec.layer_num,
        batch_size=1,
        max_length=len(ids) + decode_tokens,
        max_new_length=decode_tokens,
        num_key_value_heads=spec.num_key_value_heads,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        dtype=llm.dtype,
        layer_mapping=llm.layer_mapping,
    )
    layers = llm.layers
    llm.layers = list(layers)
    for layer in {layer for layer, _ in wanted if layer > 0}:
        tell = partial(cache.predict, layer_idx=layer)
        llm.layers[layer - 1] = WatchedLayer.of(layers[layer - 1], layers[layer], tell)
    try:
        first = llm.prefill(torch.tensor([ids]), None, cache).argmax(-1)
        answer = torch.cat((first[:, None], llm.decode(cache, first, decode_tokens, stop_ids=llm.eos_ids)), 1)
    finally:
        llm.layers = layers
    # The last token was only predicted, none of its states exist.
    return cache, answer[0, : cache.generated[0]].tolist()
