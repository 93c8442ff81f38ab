"""KVCache-Factory's method names and its budget, as this project's strategies understand them."""

from __future__ import annotations

from typing import Any

from config import EVICTING, RETRIEVAL_STRATEGIES

KVCACHE_FACTORY_METHODS = (
    "FullKV",
    "SnapKV",
    "PyramidKV",
    "H2O",
    "StreamingLLM",
    "CAM",
    "L2Norm",
    "AdaKV",
    "HeadKV",
    "ThinK",
    "MInference",
)


DEFAULT_CAPACITY = 512


def strategy_of(method: str) -> str:
    """The strategy that a method's name means, whatever its case, hyphens and underscores ("StreamingLLM" is
    streaming_llm); FullKV is full. ValueError for one that does not exist (yet), listing the known."""
    known = {_plain(strategy): strategy for strategy in RETRIEVAL_STRATEGIES} | {"fullkv": "full"}
    if _plain(method) in known:
        return known[_plain(method)]
    foreign = _plain(method) in {_plain(name) for name in KVCACHE_FACTORY_METHODS}
    hint = " (KVCache-Factory has it, this project does not)" if foreign else ""
    raise ValueError(f"method: got {method!r}{hint}; known: FullKV, {', '.join(RETRIEVAL_STRATEGIES)}")


def capacity_of(strategy: str, given: int | None, ratio: float) -> int:
    """The budget that holds: the given one, else KVCache-Factory's default, and -1 where only a share of the prompt is
    given and for the wave index, which reads no top_k. ValueError where one is given for it."""
    if strategy != "wave_index":
        default = DEFAULT_CAPACITY if ratio == -1 else -1
        return default if given is None else given
    for name, value in (("max_capacity_prompts", given), ("max_capacity_prompts_ratio", ratio)):
        if value not in (None, -1):
            raise ValueError(
                f"{name}: got {value}, allowed: -1 or not given: the budgets of wave_index are retrieval_budget and "
                "estimation_budget"
            )
    return -1


def top_k_of_budget(strategy: str, capacity: int, ratio: float, settings: Any) -> int | None:
    """The top_k that a budget stands for; None where it sets none.

    KVCache-Factory's capacity counts every token of the prompt that a head keeps, its window included. So top_k is
    capacity less the sinks and the window of `settings` (a RetroInferConfig). It is set for full attention and for
    what evicts too, which do not use it, where the budget allows: one results folder has one configuration. The wave
    index has no top_k.
    Raises ValueError for a budget that leaves nothing to retrieve and for a share of the prompt: one top_k holds for
    all prompts of a run.
    """
    static = settings.static_pattern_start + settings.static_pattern_end
    if capacity > static:
        return capacity - static
    if strategy in ("full", "wave_index", *EVICTING):
        return None
    if capacity == -1 and ratio != -1:
        raise ValueError(
            f"max_capacity_prompts_ratio: got {ratio}, allowed: -1, except for FullKV and what evicts: {strategy} "
            "has one top_k for all prompts of a run; give max_capacity_prompts"
        )
    raise ValueError(
        f"max_capacity_prompts: got {capacity}, allowed: above {static}, the {settings.static_pattern_start} sinks and "
        f"{settings.static_pattern_end} window tokens that every query reads"
    )


def eviction_of_budget(strategy: str, capacity: int, ratio: float) -> dict[str, float]:
    """The settings of strategies that evict which a budget stands for, by key; none for the wave index.

    KVCache-Factory's capacity holds where it is not -1, else the share of the prompt. Both count as `eviction.budget`
    and `eviction.budget_share` do. They are set for other strategies too, which do not use them: one results folder has
    one configuration. Raises ValueError for a strategy that evicts and a budget that is none.
    """
    if strategy == "wave_index":
        return {}
    if capacity >= 1:
        return {"eviction.budget": capacity, "eviction.budget_share": 0.0}
    if capacity == -1 and 0 < ratio <= 1:
        return {"eviction.budget_share": ratio}
    if strategy not in EVICTING:
        return {}
    if capacity == -1 and ratio != -1:
        raise ValueError(f"max_capacity_prompts_ratio: got {ratio}, allowed: above 0, at most 1")
    raise ValueError(
        f"max_capacity_prompts: got {capacity}, allowed: 1 or more, or -1 beside a max_capacity_prompts_ratio"
    )


def describe_budget(capacity: int, top_k: int | None, settings: Any) -> str:
    """What the budget counts, for protocol.json; the same for all strategies of a configuration."""
    share = settings.eviction.budget_share
    kept = f"{share} of the tokens" if share else f"{capacity} tokens"
    evicted = (
        f"{kept} of the prompt for each kv head, sinks and window among them, with what evicts (pyramidkv: in the mean "
        "of the layers; streaming_llm and h2o: generated ones among them)"
    )
    if top_k is None:
        unused = (
            "not used: full attention reads all tokens, the wave index what retrieval_budget "
            f"{settings.retrieval_budget} and estimation_budget {settings.estimation_budget} say"
        )
        return f"{evicted}; else {unused}" if share or capacity >= 1 else unused
    graph = settings.attention_aware_graph
    estimated = {
        "none": "nothing stands for the other tokens",
        "softmax_lift": "top_k counts draws, whose weights stand for the other tokens (softmax_lift)",
        "centroid": f"clusters stand for the other tokens (centroid), and estimation_budget {graph.estimation_budget} "
        "of them are read on top",
    }
    return (
        f"{capacity} tokens of the prompt per query head: {settings.static_pattern_start} sinks, "
        f"{settings.static_pattern_end} window tokens and top_k {top_k}; a kv head reads the union over its query "
        f"heads; {estimated[graph.estimation]}; generated tokens come on top; {evicted}; full "
        "attention reads all tokens whatever the budget"
    )


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
