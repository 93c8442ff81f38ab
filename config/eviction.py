"""The sections of the configuration for strategies that keep a budget of each prompt's tokens."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from config.section import Section

# Strategies whose name may state the budget behind an @, snapkv@512.
EVICTING = ("streaming_llm", "h2o", "snapkv", "pyramidkv", "circuitkv")


class EvictionConfig(Section):
    """Section `eviction`: what streaming_llm, h2o, snapkv, pyramidkv and circuitkv keep of a prompt.

    window, kernel_size and pooling are those of KVCache-Factory's runner, by which the published LongBench tables were
    made; its classes default to 64, 5 and average. static_pattern_start tokens are the sinks of streaming_llm and
    circuitkv; the others keep none on principle, as published.
    """

    budget: int = Field(
        default=1024,
        ge=1,
        description="tokens of a prompt that each kv head keeps, sinks and window among them (max_capacity_prompts in "
        "KVCache-Factory); shorter prompts are kept whole",
    )
    budget_share: float = Field(
        default=0.0, ge=0, le=1, description="the share of each prompt's tokens that is kept instead; 0: budget holds"
    )
    window: int = Field(
        default=8, ge=1, description="last tokens of a prompt, always kept; their queries score, but for streaming_llm"
    )
    kernel_size: int = Field(
        default=7, ge=1, description="tokens whose scores snapkv, pyramidkv and circuitkv pool, an odd number"
    )
    pooling: Literal["max", "average", "none"] = Field(default="max", description="how they are pooled")
    group: Literal["mean", "max"] = Field(
        default="mean", description="how scores of the query heads that share a kv head become those of the kv head"
    )
    pyramid_beta: int = Field(
        default=20,
        ge=1,
        description="pyramidkv: the last layer keeps one of so many tokens of the mean, and the window",
    )

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, kernel_size: int) -> int:
        if kernel_size % 2 == 0:
            raise PydanticCustomError("kernel_size", "even", {"allowed": "an odd number >= 1"})
        return kernel_size


CircuitScore = Literal["query", "hub", "window", "rank_max", "null_query", "null_hub", "null_window", "direct"]
CIRCUIT_SCORES: tuple[str, ...] = get_args(CircuitScore)
CircuitRows = Literal["exact", "window"]


class CircuitKVConfig(Section):
    """Section `circuitkv`: tokens by how often random walks backwards along the attention visit them."""

    score: CircuitScore = Field(
        default="query",
        description="expected visits of walks from the last token (query), from all tokens alike (hub) or from the "
        "last `window` (window); null_: over what they are under uniform attention; rank_max: the better of the ranks "
        "by query and hub; direct: the attention of the last `window` queries, no walk",
    )
    rows: CircuitRows = Field(
        default="exact",
        description="whose attention is walked along: of all tokens, or of the last `window`, the others having the "
        "same profile, the sum of these",
    )
    window: int = Field(default=64, ge=1, description="last tokens of a prompt, whose attention is observed")
    count: Literal["visits", "probability"] = Field(
        default="visits",
        description="expected visits, those of a token that walks stay at included, or the probability of ever coming "
        "to it",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="attention to the power 1 / temperature, normalised anew; 1 only with rows=window",
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="a walk goes on with this probability at each step")
