"""Static tokens attended exactly, all others retrieved through a token index (RetrievalAttention, section 3.2)."""

from __future__ import annotations

import itertools
import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from config import ESTIMATIONS

from .background import BackgroundWork
from .growing_layers import inserted_at_once, static_and_grown
from .index import TokenIndex
from .index._native import trim_memory
from .index.metric import LATE_QUERIES, query_moment
from .indexed_sequences import IndexedSequences
from .lift import SoftmaxLift
from .memory import CPU, Need, RunShape, usable_cpus
from .retrieving_layers import RetrievingLayers
from .static_zone import check_static, sinks_and_window
from .stats import Agreement, CacheStats
from .tail import CentroidTail

if TYPE_CHECKING:
    from config import RetroInferConfig

# Layers whose index is finished by the CPU while the GPU goes on: their links lie in CPU memory twice.
_LAYERS_BUILT = 2


class TokenIndexCache(RetrievingLayers):
    """Keys and values of the prompt in CPU memory (pinned beside a GPU), static tokens where the layer computes; with
    `gpu_only` all of these, and beside a GPU a copy of the keys in CPU memory, for the index, whose bytes it counts as.

    Static: the first `static_pattern_start` tokens, the last `static_pattern_end` of the prompt and generated ones.
    Between them lie the indexed tokens: per query head the index finds top_k, and the g query heads of a kv head attend
    to the union of what they found. A prompt with at most `min_indexed` tokens between is attended in full, which
    `stats.notes` says, and so is what follows it. `core`: CPU threads of the index beside a GPU.

    Where `insert_batch` tokens were generated, as many of the oldest behind the sinks leave the static ones for the
    index (and the clusters of the rest), linked through the queries of the last `insert_batch` steps; a layer does so
    `insert_batch` / layers steps behind the one before. 0: all generated tokens stay static.

    estimation: what stands for the indexed tokens that are not retrieved. "none": nothing. "centroid": the clusters
    that they form (CentroidTail), or the best `estimation_budget` of these. "softmax_lift": the tokens retrieved are a
    weighted sample of all (SoftmaxLift), top_k draws a query head, always the same for the same prompt.

    warm_start: hits of the step before, for each query head, that a search may start from. resume_ef: beam width
    of searches that go on from one for what their queries will be about; 0: none begins before its query is there.
    """

    def __init__(
        self,
        *,
        max_new_length: int,
        static_pattern_start: int = 4,
        static_pattern_end: int = 64,
        core: int | None = None,
        top_k: int = 100,
        min_indexed: int = 0,
        warm_start: int = 0,
        resume_ef: int = 0,
        estimation: str = "none",
        estimation_budget: float = 1.0,
        insert_batch: int = 512,
        gpu_only: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(max_new_length=max_new_length, **common)
        check_static(max_new_length, static_pattern_start, static_pattern_end)
        if top_k < 1:
            raise ValueError(f"top_k: got {top_k}, allowed: >= 1")
        if estimation not in ESTIMATIONS:
            raise ValueError(f"estimation: got {estimation!r}, allowed: {', '.join(ESTIMATIONS)}")
        if not 0 <= estimation_budget <= 1:
            raise ValueError(f"estimation_budget: got {estimation_budget}, allowed: 0 to 1")
        if insert_batch < 0:
            raise ValueError(f"insert_batch: got {insert_batch}, allowed: >= 0")
        self.insert_batch = inserted_at_once(insert_batch, max_new_length)
        self.estimation, self.estimation_budget, self.gpu_only = estimation, estimation_budget, gpu_only
        self.sinks, self.window = static_pattern_start, static_pattern_end
        self.top_k, self.min_indexed, self.warm_start = top_k, min_indexed, warm_start
        self.resume_ef = resume_ef
        # Without a GPU the main thread computes too: torch's own thread count is the right one then.
        self.num_threads = None
        if core and self.devices[0].type == "cuda":
            self.num_threads = min(core, usable_cpus())
            if core > self.num_threads:
                self.stats.note(f"core: {core} threads were asked for, {self.num_threads} are used, one for each CPU")
        self._groups = [[] for _ in self.devices]
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None  # queries, keys, values that `sync` builds from
        self._tails = []
        self._tail_seconds = 0.0
        self._building = BackgroundWork(_LAYERS_BUILT)
        self._copied: dict[torch.device, torch.cuda.Event] = {}  # the prompt's states stored last, of layers there
        self._prompt_seconds: dict[str, float] = {}
        self._allocate()

    @classmethod
    def options(cls, settings: RetroInferConfig) -> dict[str, Any]:
        return {
            "static_pattern_start": settings.static_pattern_start,
            "static_pattern_end": settings.static_pattern_end,
            "core": settings.core,
            "top_k": settings.attention_aware_graph.top_k,
            "warm_start": settings.attention_aware_graph.warm_start,
            "resume_ef": settings.attention_aware_graph.resume_ef,
            "estimation": settings.attention_aware_graph.estimation,
            "estimation_budget": settings.attention_aware_graph.estimation_budget,
            "insert_batch": settings.attention_aware_graph.insert_batch,
            "gpu_only": settings.gpu_only,
        }

    @classmethod
    @abstractmethod
    def index_of(cls, settings: RetroInferConfig) -> TokenIndex:
        """An empty index as these settings make it."""

    @classmethod
    def most_in_full(cls, settings: RetroInferConfig) -> int:
        """`min_indexed` as these settings make it."""
        return 0

    @classmethod
    def layer_needs(cls, settings: RetroInferConfig, shape: RunShape, device: torch.device) -> list[Need]:
        o, new, min_indexed = cls.options(settings), shape.max_new_length, cls.most_in_full(settings)
        sinks, window, lifted = o["static_pattern_start"], o["static_pattern_end"], o["estimation"] == "softmax_lift"
        batch = inserted_at_once(o["insert_batch"], new)
        static, grown = static_and_grown(shape.longest, new, sinks + window + min_indexed, window, batch)
        store = shape.store_bytes(grown, device)
        needs = [
            Need(device if o["gpu_only"] else CPU, "keys and values", store),
            Need(device, "static tokens", 2 * shape.batch * static * shape.row_bytes),
        ]
        if cls.copies_keys(o["gpu_only"], device):
            needs.append(Need(CPU, "keys to search", store // 2))
        middles = [max(length - sinks - window, 0) for length in shape.lengths]
        if max(middles) <= min_indexed:
            return needs
        index, rows, dim, most = cls.index_of(settings), shape.kv_heads, shape.head_dim, max(middles)
        kept = sum(
            index.expected_bytes(rows, n, dim, shape.dtype, lifted) + (4 * rows * n if lifted else 0)
            for n in middles
            if n > min_indexed
        )
        group, together = shape.heads // shape.kv_heads, rows * shape.prefill_bsz
        built = index.build_bytes(together, group, shape.longest, most, dim)
        if index.lists_queries and device.type == "cuda":
            built += shape.prefill_bsz * most * shape.row_bytes  # the keys that the queries there are compared with
        needs += [
            Need(CPU, "index", kept),
            Need(device if index.lists_queries else CPU, "a layer's build", built, "build"),
        ]
        if o["estimation"] == "centroid":
            there, here = CentroidTail.expected_bytes(shape.batch * rows, most, dim, shape.dtype)
            needs += [Need(device, "clusters", there), Need(CPU, "clusters", here)]
        return needs

    @classmethod
    def build_key(cls, settings: RetroInferConfig) -> str:
        graph = settings.attention_aware_graph.model_dump(
            exclude={"ef_search", "top_k", "warm_start", "resume_ef", "estimation_budget"}
        )
        # Clusters can be added to a filled cache; the sample's index is another one.
        graph["estimation"] = graph["estimation"] == "softmax_lift"
        return json.dumps([graph, settings.model_dump(exclude={"attention_aware_graph"})], sort_keys=True)

    def retune(self, settings: RetroInferConfig) -> None:
        options = self.options(settings)
        self.top_k, self.estimation = options["top_k"], options["estimation"]
        self._buffers.clear()
        self._searches.clear()
        self.version += 1
        self.warm_start, self.resume_ef = options["warm_start"], options["resume_ef"]
        self.estimation_budget = options["estimation_budget"]
        for stage in ("build", "cluster"):
            self.stats.seconds[stage] = self._prompt_seconds.get(stage, 0.0)
        self._use_tails()

    def rewind(self) -> None:
        """Raises ValueError where generated tokens are in the index, which does not forget."""
        if self._inserted:
            raise ValueError(
                f"rewind: {self._inserted} generated tokens are indexed, allowed: none, as with insert_batch 0"
            )
        for zone, generated in zip(self._zones, self.generated, strict=True):
            zone.drop_last(generated)
        self.generated = [0] * self.layer_num
        for search in self._searches.values():
            search.forget()
        self._latest = self._latest_queries()
        self._due.clear()
        self.stats = CacheStats(
            seconds=defaultdict(float, self._prompt_seconds),
            notes=self.stats.notes,
            agreement=Agreement.zeros(self.layer_num, self.num_heads) if self.stats.agreement else None,
        )

    def indexed_range(self, length: int) -> range:
        """Positions of a prompt of `length` tokens that are indexed; empty where it is attended in full."""
        middle = range(self.sinks, length - self.window)
        return middle if len(middle) > self.min_indexed else range(0)

    def store_prompt(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, start_bdx: int) -> None:
        rows, length = slice(start_bdx, start_bdx + len(k)), k.shape[1]
        indexed = self.indexed_range(length)
        with self.stats.timed("store"):
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
            put = self._put(layer_idx, rows, slice(length), keys, values)
            if put is not None:
                self._copied[k.device] = put
            if indexed:
                keys, values = (sinks_and_window(states, self.sinks, self.window) for states in (keys, values))
            self._zones[layer_idx].put(rows, keys, values)
        if indexed:
            self._pending = q, k, v
        else:
            self.note_full(length)

    def note_full(self, length: int) -> None:
        self.stats.note(
            f"{length} tokens are attended in full: {self.sinks} + {self.window} are static and at most "
            f"{self.min_indexed} others are too few to index"
        )

    def sync(self, layer_idx: int, start_bdx: int) -> None:
        """Builds the layer's index over the sequences stored last, and their clusters where these are wanted; of the
        queries only the second moment is kept."""
        if self._pending is None:
            return
        (q, k, v), self._pending = self._pending, None
        count, length = q.shape[:2]
        indexed = self.indexed_range(length)
        rows = count * self.kv_head
        # [count, L, Hkv * g, D] -> [count * Hkv, g, L, D]
        queries = q.unflatten(2, (self.kv_head, self.group_size)).permute(0, 2, 3, 1, 4)
        positions = torch.arange(length, device=q.device) - indexed.start
        index = self.new_index()
        lift = SoftmaxLift(index, self.kv_head, seed=layer_idx) if self.estimation == "softmax_lift" else None
        sequences, tokens = slice(start_bdx, start_bdx + count), slice(indexed.start, indexed.stop)
        stored = self._searched_keys(layer_idx)[sequences, :, tokens].flatten(0, 1)
        queries = queries.reshape(rows, self.group_size, length, self.head_dim)
        keys, values = (states[:, tokens].transpose(1, 2) for states in (k, v))
        copied = self._copied.get(k.device)
        with self.stats.timed("build"):
            if copied is not None and index.lists_queries:
                rest = (lift or index).start(stored, queries, positions, keys_there=keys.flatten(0, 1).contiguous())
                self._building.put(partial(_finish_build, copied, rest))
            else:
                if copied is not None:
                    copied.synchronize()
                (lift or index).build(stored, queries, positions)
            moment = query_moment(queries[:, :, -LATE_QUERIES:])
        self.keep_index(layer_idx, start_bdx, count, index, lift, moment)
        del q, queries
        if self.estimation == "centroid":
            begin = perf_counter()
            if not self._tails:
                self._tails = [self._empty_tail(layer) for layer in range(self.layer_num)]
            self._tails[layer_idx].add(sequences, keys, values, moment)
            self._tail_seconds += perf_counter() - begin
        trim_memory()

    def keep_index(
        self, layer_idx: int, start_bdx: int, count: int, index: TokenIndex, lift: SoftmaxLift | None, moment: Tensor
    ) -> None:
        indexed = self.indexed_range(self.prompt_lengths[start_bdx])
        group = IndexedSequences(start_bdx, count, indexed.start, indexed.stop, index, lift, moment)
        self._groups[layer_idx].append(group)

    def prepare_cache(self) -> None:
        """Waits for what `store_prompt` and `sync` began. Makes the clusters that stand for the rest, where they do and
        `sync` has not made them."""
        if self._building.pending:
            with self.stats.timed("build"):
                self._building.finish()
        for copied in self._copied.values():
            copied.synchronize()
        self._copied.clear()
        for group in itertools.chain.from_iterable(self._groups):
            for stage, seconds in group.index.build_seconds.items():
                self.stats.seconds[stage] += seconds
        self._prompt_seconds = dict(self.stats.seconds)
        self._use_tails()

    def _use_tails(self) -> None:
        """Makes the tails if they are wanted and not there; their seconds count where they are used."""
        if self.estimation != "centroid":
            return
        if not self._tails:
            begin = perf_counter()
            self._tails = [self._tail_of_stored(layer_idx) for layer_idx in range(self.layer_num)]
            self._tail_seconds = perf_counter() - begin
        self.version += 1
        for tail in self._tails:
            tail.share = self.estimation_budget
        for stage in ("build", "cluster"):
            self.stats.seconds[stage] += self._tail_seconds

    def _empty_tail(self, layer_idx: int) -> CentroidTail:
        batches = self.max_new_length // self.insert_batch if self.insert_batch else 0
        how = (self.dtype, self.devices[layer_idx], (batches, self.insert_batch))
        return CentroidTail(self.batch_size, self.kv_head, self.head_dim, *how)

    def _tail_of_stored(self, layer_idx: int) -> CentroidTail:
        tail = self._empty_tail(layer_idx)
        for group in self._groups[layer_idx]:
            keys, values = (group.tokens(stores[layer_idx]) for stores in (self._keys, self._values))
            tail.add(group.sequences, keys, values, group.query_moment)
        return tail

    @property
    def index_bytes(self) -> int:
        indexes = sum((group.lift or group.index).nbytes for groups in self._groups for group in groups)
        tails = self._tails if self.estimation == "centroid" else []
        copies = sum(keys.nbytes for keys in self._key_copies.values())
        return indexes + sum(tail.nbytes for tail in tails) + copies


def _finish_build(copied: torch.cuda.Event, rest: Callable[[], None]) -> None:
    """What is left of a build whose keys are there behind `copied`."""
    copied.synchronize()
    rest()
    trim_memory()
