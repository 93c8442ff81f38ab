"""The typed configuration: every key, its default with the reason for it, and what it accepts."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from config.eviction import CIRCUIT_SCORES, EVICTING, CircuitKVConfig, EvictionConfig
from config.section import ConfigError, Section

RetrievalStrategy = Literal[
    "full", "flat", "attention_aware_graph", "wave_index", "ivf", "hnsw", "streaming_llm", "h2o", "snapkv", "pyramidkv",
    "circuitkv", "auto",
]  # fmt: skip
RETRIEVAL_STRATEGIES: tuple[str, ...] = get_args(RetrievalStrategy)
# Those that retrieve tokens by an index, and can estimate the rest.
ESTIMATING = ("flat", "attention_aware_graph", "ivf", "hnsw")
# "auto" is one of these.
MAY_ESTIMATE = (*ESTIMATING, "auto")
Estimation = Literal["none", "centroid", "softmax_lift"]
ESTIMATIONS: tuple[str, ...] = get_args(Estimation)
ATTENTION_TYPES: tuple[str, ...] = ("Full_Flash_Attn", "RetroInfer")


class GraphConfig(Section):
    """Section `attention_aware_graph`: how the graph over the prompt's keys is built and searched.

    Sources: RetrievalAttention, section 3.2; RoarGraph (projection of query-to-key links). Counts are keys or links;
    search sizes are per query head, the degree is per key.
    """

    q_knn: int = Field(
        default=32,
        ge=2,
        description="nearest keys listed for each prompt query at build; the first is the pivot, so 1 gives no link. "
        "32 with a wide beam found more than 100 with twice the degree, in sketches on traces of 8,192 tokens",
    )
    query_stride: int = Field(
        default=4,
        ge=1,
        description="of the prompt queries before the last 4,096 of each head, every query_stride-th is listed; 1: all "
        "are. On real traces of 32,768 tokens 4 lost .001 of recall@100 at most, for fewer keys scored, 8 lost .003",
    )
    key_degree: int = Field(
        default=32,
        ge=2,
        description="places for the links that leave a key, query links and key links together. 32 are 64 bytes, an "
        "eighth of a key's bfloat16 KV at head dimension 128; above 65,535 keys some places tell the ids' upper halves",
    )
    key_links: int = Field(
        default=24,
        ge=0,
        description="links of key_degree that go to the nearest keys by mean-centred cosine; 0 is RetrievalAttention's "
        "recipe, which leaves keys unreachable. With 24, recall at equal keys scored was as with 16, or better",
    )
    projection: Literal["auto", "co_occurrence", "roargraph"] = Field(
        default="auto",
        description="how the lists of queries make the other links. co_occurrence: half to the keys that stand nearest "
        "in the latest lists that name a key, half to what a sample of such lists ranks first. roargraph: "
        "RetrievalAttention's, lists of one pivot pruned by occlusion. auto is roargraph where key_links is 0, the "
        "paper's recipe, and co_occurrence else, which scores fewer keys",
    )
    key_metric: Literal["attention", "cosine"] = Field(
        default="attention",
        description="space of the key links' cosine. attention: keys times the square root of E[q q^T] over the "
        "prompt's last queries, in which distances are those of logits; cosine: keys as they are",
    )
    ef_search: int = Field(
        default=160,
        ge=1,
        description="beam width of the search, raised to top_k where smaller. On real traces of 32,768 tokens 115 are "
        "enough for a recall@100 of .95 on average over heads; 160 lift the worst heads",
    )
    warm_start: int = Field(
        default=100,
        ge=0,
        description="hits of the step before, of each query head, that the searches of its kv head start from, beside "
        "the entries; 0: none. Neighbouring queries want much the same keys: on traces the same search finds more for "
        "as many keys scored",
    )
    resume_ef: int = Field(
        default=100,
        ge=0,
        description="beam width, raised to top_k where smaller, of a search that goes on from one for a predicted "
        "query. The CPU does that beside a GPU before the query is there, with ef_search, for what the layer would ask "
        "of the states that enter the layer before. 0: searches wait for their queries. On a real trace of 32K tokens "
        "160 and then 100 found as much as 160 at once, the second part in a third of that time (sketch)",
    )
    top_k: int = Field(
        default=100,
        ge=1,
        description="keys retrieved per query head, at most the context length, by flat too, and by ivf and hnsw "
        "unless their sections state their own. 100 is RetrievalAttention's choice",
    )
    index_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = Field(
        default="bfloat16",
        description="type of the keys that search reads. bfloat16 is how most models keep K and V, which needs no "
        "copy; any other type than the store's makes one. auto is the store's, whatever it is. int8 is a copy for the "
        "walk, whose beam the store then ranks: on real traces of 32,768 tokens it found as many with the default "
        "beam, which is scored twice, and took as long",
    )
    graph_build_batch: int = Field(
        default=4096,
        ge=1,
        description="prompt queries per block of the exact neighbour search. 4096 float32 score rows over 131,072 keys "
        "are 2 GiB, the bound on what a block needs",
    )
    knn_backend: Literal["auto", "native", "faiss", "triton", "torch"] = Field(
        default="auto",
        description="what runs the exact neighbour search. auto takes triton where the states are on a GPU, which "
        "the others but torch cannot read; on a CPU native, by tiles of products in AMX, AVX-512 or AVX2, and faiss "
        "where it has none of these; torch, a plain product and top-k, runs on both",
    )
    estimation: Estimation = Field(
        default="centroid",
        description="what stands for the indexed tokens that are not retrieved, whichever index finds those that are. "
        "none: nothing, as in RetrievalAttention. centroid: the clusters that they form. softmax_lift: the retrieved "
        "are a weighted sample of all. On real traces dropped tokens are a larger error than what a search misses",
    )
    estimation_budget: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the clusters that estimation centroid attends to, best first. All of them are one for 10 "
        "tokens; RetroInfer's 0.232 raised the mean error on real traces of 32,768 tokens by 20 to 33 %",
    )
    num_entries: int = Field(
        default=64,
        ge=1,
        description="keys where each search starts beside the hits of the step before: those that the last prompt "
        "queries rank first. Several, because one entry point may be cut off from whole regions",
    )

    insert_batch: int = Field(
        default=512,
        ge=0,
        description="generated tokens that leave the static ones for the index at a time, once as many are there, "
        "whichever index it is; 0: none does. Larger ones are dearer steps, fewer of them, and more tokens attended to "
        "exactly, up to twice as many; layers take turns",
    )

    @field_validator("key_links")
    @classmethod
    def _within_degree(cls, key_links: int, info: ValidationInfo) -> int:
        degree = info.data.get("key_degree")
        if degree is not None and key_links > degree:
            raise PydanticCustomError("key_links", "above key_degree", {"allowed": f"0 to {degree} (key_degree)"})
        return key_links


_OWN_TOP_K = Field(
    default=0,
    ge=0,
    description="keys retrieved per query head, at most the context length; 0 is the top_k of attention_aware_graph, "
    "so that strategies are compared at one count",
)


class FlatConfig(Section):
    """Section `flat`: the exact scan."""

    on_gpu: bool = Field(
        default=False,
        description="scan on the GPU of each layer, over a copy of its keys in 8 bits that lies there (D + 4 bytes for "
        "a key of dimension D); keys and values stay in CPU memory. The top 100 are then exact but for about 2 in 100",
    )
    scan_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the clusters of estimation centroid that each query head chooses by their centroids, "
        "top_k at least, for on_gpu to scan those that any head of the group has chosen; 1: all keys. On real traces "
        "of 32,768 tokens 0.05 scanned 9 % of the keys, for a recall@100 of .96 to .98, of all keys .98 to .99",
    )


class IVFConfig(Section):
    """Section `ivf`: inverted lists through faiss. RetrievalAttention does not state the parameters of its IVF."""

    n_list: int = Field(
        default=0,
        ge=0,
        description="inverted lists of a kv head, at most one a key; 0 is 4 sqrt(N), the low end of what faiss "
        "advises. Neither 2 nor 8 sqrt(N) was clearly better at equal keys scored, on traces of 8,192 tokens",
    )
    n_probe: int = Field(
        default=0,
        ge=0,
        description="lists searched per query head, all where there are fewer; 0 is one in 20: with the centroids 10 % "
        "of the keys scored at 8,192 tokens and 9 % at 16,384, for a recall@100 of .79 and .82 on traces",
    )
    top_k: int = _OWN_TOP_K

    @field_validator("n_probe")
    @classmethod
    def _within_lists(cls, n_probe: int, info: ValidationInfo) -> int:
        n_list = info.data.get("n_list")
        if n_list and n_probe > n_list:
            raise PydanticCustomError("n_probe", "above n_list", {"allowed": f"0 to {n_list} (n_list)"})
        return n_probe


class HNSWConfig(Section):
    """Section `hnsw`: HNSW through faiss. RetrievalAttention does not state the parameters of its HNSW."""

    m: int = Field(
        default=32,
        ge=2,
        description="links of a key on the upper levels, twice as many on the lowest. 32, faiss's default, found far "
        "more than 16",
    )
    ef_construction: int = Field(
        default=40,
        ge=1,
        description="beam width of the build. 40, faiss's default: with more candidates than 2 m, links are chosen "
        "among them, which by inner product keeps those to a few keys of large norm. On traces of 16,384 tokens "
        "recall@100 was .68 with 13 % of the keys scored; with 200 it was .49 with 8 %, .57 with 16 % at ef_search 400",
    )
    ef_search: int = Field(
        default=160, ge=1, description="beam width of the search, raised to top_k where smaller. 160 as the graph's"
    )
    top_k: int = _OWN_TOP_K


class RetroInferConfig(Section):
    """Section `RetroInfer`: RetroInfer's keys with the values of its files, the strategy, and the strategy's section.

    The wave index reads pages_per_cluster, the budgets and cache_ratio. Of its other keys, n_centroids and n_segment
    are what its rule gives for one context length, while it follows the length of each prompt; buffer_cluster_num is
    carried and checked, but read by no strategy. use_cuda_graph is for all but the wave index, gpu_only for all but
    full attention, which always is.
    """

    static_pattern_start: int = Field(
        default=4, ge=0, description="first tokens, attended exactly and never indexed (sinks)"
    )
    static_pattern_end: int = Field(
        default=64, ge=1, description="last tokens, attended exactly and never indexed (window)"
    )
    core: int = Field(
        default=22,
        ge=1,
        description="CPU threads of build and search beside a GPU, but no more than the CPUs that the process may use",
    )
    n_centroids: int = Field(
        default=8192,
        ge=1,
        description="clusters per kv head: one for 16 tokens, here of 131,072; informative, wave_index follows the "
        "prompt's length",
    )
    n_segment: int = Field(
        default=16,
        ge=1,
        description="segments clustered on their own: one for 8192 tokens, here of 131,072; informative likewise",
    )
    pages_per_cluster: int = Field(default=2, ge=1, description="pages of 8 tokens that an average cluster fills")
    retrieval_budget: float = Field(default=0.018, ge=0, le=1, description="share of the clusters attended exactly")
    estimation_budget: float = Field(
        default=0.232,
        ge=0,
        le=1,
        description="share of the wave index's clusters estimated by centroids; attention_aware_graph has its own",
    )
    cache_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the clusters held on the GPU; 0 means three times the retrieved ones",
    )
    buffer_cluster_num: int = Field(default=32, ge=1, description="clusters that the execution buffer holds at least")
    use_cuda_graph: bool = Field(default=False, description="replay decode steps as CUDA graphs, on a GPU")
    gpu_only: bool = Field(
        default=False,
        description="keep all keys and values on the GPU; what searches on the CPU has a copy of the keys there",
    )
    retrieval_strategy: RetrievalStrategy = Field(
        default="wave_index",
        description="which tokens a decoding query attends to. wave_index, RetroInfer's own method, is what its files "
        "mean, which have no such key. auto: beside GPUs flat with flat.on_gpu, for prompts of up to 262,144 tokens "
        "whose keys in 8 bits fit their memory, as no search was faster there; else attention_aware_graph",
    )
    attention_aware_graph: GraphConfig = Field(
        default=GraphConfig(), description="knobs of the strategy of the same name"
    )
    flat: FlatConfig = Field(default=FlatConfig(), description="knobs of the strategy of the same name")
    ivf: IVFConfig = Field(default=IVFConfig(), description="knobs of the strategy of the same name")
    hnsw: HNSWConfig = Field(default=HNSWConfig(), description="knobs of the strategy of the same name")
    eviction: EvictionConfig = Field(
        default=EvictionConfig(), description="knobs of the strategies that evict: " + ", ".join(EVICTING)
    )
    circuitkv: CircuitKVConfig = Field(default=CircuitKVConfig(), description="more knobs of the strategy of that name")

    def top_k_of(self, strategy: str) -> tuple[str, int]:
        """(key, value) of the top_k that holds for a strategy: its own section's where stated, else the graph's."""
        own = getattr(getattr(self, strategy, None), "top_k", 0)
        return (f"{strategy}.top_k", own) if own else ("attention_aware_graph.top_k", self.attention_aware_graph.top_k)


class ModelConfig(Section):
    """A whole configuration file, `config/<model name>.json`."""

    RetroInfer: RetroInferConfig = Field(description="the one section of a configuration file")


def with_estimation(name: str, settings: RetroInferConfig) -> tuple[str, RetroInferConfig]:
    """The strategy and settings of a variant: `<strategy>+<estimation>`, `circuitkv+<score>`, `<strategy>@<budget>`
    for what evicts, both of these, or a strategy's name, as configured.

    Raises:
        ConfigError: for an unknown strategy, estimation, score or budget, or one beside a strategy that has none.
    """
    variant, at, budget = name.partition("@")
    strategy, plus, estimation = variant.partition("+")
    if strategy not in RETRIEVAL_STRATEGIES:
        raise ConfigError(f"strategy: got {strategy!r}, allowed: {', '.join(RETRIEVAL_STRATEGIES)}")
    if at:
        if strategy not in EVICTING or not budget.isdigit() or int(budget) < 1:
            raise ConfigError(
                f"strategy: got {name!r}, allowed: a budget of tokens behind {', '.join(EVICTING)}, as in snapkv@512"
            )
        kept = settings.eviction.model_copy(update={"budget": int(budget), "budget_share": 0.0})
        settings = settings.model_copy(update={"eviction": kept})
    if not plus:
        return strategy, settings
    if strategy == "circuitkv":
        if estimation not in CIRCUIT_SCORES:
            raise ConfigError(f"circuitkv.score: got {estimation!r} in {name!r}, allowed: {', '.join(CIRCUIT_SCORES)}")
        walks = settings.circuitkv.model_copy(update={"score": estimation})
        return strategy, settings.model_copy(update={"circuitkv": walks})
    if strategy not in MAY_ESTIMATE:
        raise ConfigError(
            f"strategy: got {name!r}, allowed: {strategy!r}; an estimation goes with {', '.join(MAY_ESTIMATE)}"
        )
    if estimation not in ESTIMATIONS:
        raise ConfigError(f"estimation: got {estimation!r} in {name!r}, allowed: {', '.join(ESTIMATIONS)}")
    graph = settings.attention_aware_graph.model_copy(update={"estimation": estimation})
    return strategy, settings.model_copy(update={"attention_aware_graph": graph})


def resolve_strategy(attention_type: str, settings: RetroInferConfig) -> str:
    """The retrieval strategy that an attention type stands for.

    "Full_Flash_Attn" is "full", "RetroInfer" is the configured `retrieval_strategy`, a strategy's name is itself.

    Raises:
        ConfigError: for any other attention type, listing all of them.
    """
    if attention_type == "Full_Flash_Attn":
        return "full"
    if attention_type == "RetroInfer":
        return settings.retrieval_strategy
    if attention_type in RETRIEVAL_STRATEGIES:
        return attention_type
    raise ConfigError(
        f"attn_type: got {attention_type!r}, allowed: {', '.join(ATTENTION_TYPES + RETRIEVAL_STRATEGIES)}"
    )
