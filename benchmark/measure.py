"""One strategy on one batch of prompts: the answers, whether they are right, and what they cost."""

from __future__ import annotations

from typing import Any

from cache_hub import KV_Cache
from model_hub import LLM, GenerationTiming

from .results import peak_memory_bytes

# Beside a GPU the CPU's are those of another thread: together they may take longer than the build was waited for.
_BUILD_STAGES = (
    *("query_key_knn", "key_key_knn", "projection", "links_copy", "repair", "pack", "index", "cluster"),
    *("score", "select"),
)
_DECODE_STAGES = ("wait", "search", "attention", "admit", "insert", "update")


def measure(
    llm: LLM,
    tokenizer: Any,
    prompts: list[str],
    expected: list[str],
    strategy: str,
    attn_config: dict[str, Any],
    *,
    special_tokens: bool = False,
    **generation: Any,
) -> dict[str, Any]:
    """Generates for a batch of prompts and returns the record that a results file keeps (see `record`).

    expected: what each answer must contain to be right. special_tokens: let the tokenizer add its own (a prompt made
    from a chat template has them already). generation: further arguments of LLM.generate.
    """
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=special_tokens)
    out = llm.generate(
        attention_type=strategy,
        inputs_ids=inputs.input_ids.to(llm.device),
        attention_masks=inputs.attention_mask,
        attn_config=attn_config,
        **generation,
    )
    answers = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert llm.cache is not None
    assert llm.timing is not None
    return {
        "answer": answers[0] if len(answers) == 1 else answers,
        "correct": all(text in answer for text, answer in zip(expected, answers, strict=True)),
        "prompt_tokens": inputs.attention_mask.sum(1).tolist(),
        "new_tokens": [len(tokens) for tokens in out],
        **record(llm.cache, llm.timing),
    }


def record(cache: KV_Cache, timing: GenerationTiming) -> dict[str, Any]:
    """What a generation cost.

    prefill_seconds is without build_seconds; both are of the whole batch. ms_per_token: of one decode step of the
    batch, by stage in ms_by_stage ("model": all that is not another stage). attended_share, estimated_share and
    scored_share: tokens attended and clusters standing for others per kv head, keys scored per query head, as a share
    of the context. recall, mass (of all tokens attended to) and mass_of_exact (relative to retrieving the exact top k):
    means over layers, heads and steps, None unless diagnosed; the worst head beside them. Bytes of the index and of the
    KV store.
    """
    stats, steps = cache.stats, max(timing.decode_steps, 1)
    build = stats.seconds["build"]
    decode = timing.decode_seconds - stats.seconds["diagnosis"]
    stages = {stage: stats.seconds[stage] for stage in _DECODE_STAGES}
    stages["model"] = decode - sum(stages.values())
    return {
        "prefill_seconds": timing.prefill_seconds + timing.prepare_seconds - build,
        "build_seconds": build,
        "build_seconds_by_stage": {stage: stats.seconds[stage] for stage in _BUILD_STAGES},
        "decode_seconds": decode,
        "ms_per_token": 1000 * decode / steps,
        "ms_by_stage": {stage: 1000 * seconds / steps for stage, seconds in stages.items()},
        "attended_share": stats.attended_share,
        "estimated_share": stats.estimated_share,
        "scored_share": stats.scored_share,
        **_agreement(cache),
        "index_bytes": cache.index_bytes,
        "kv_bytes": cache.kv_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "notes": stats.notes,
    }


def _agreement(cache: KV_Cache) -> dict[str, Any]:
    agreement = cache.stats.agreement
    if agreement is None or not agreement.steps.any():
        return {"recall": None, "mass": None}
    measured = agreement.steps > 0
    recall = agreement.mean(agreement.recall)[measured]
    of_exact = (agreement.mass / agreement.exact_mass.clamp(min=1e-12))[measured]
    return {
        "recall": recall.mean().item(),
        "recall_worst_head": recall.min().item(),
        "recall_by_layer": recall.mean(1).tolist(),
        "mass": agreement.mean(agreement.mass)[measured].mean().item(),
        "mass_of_exact": of_exact.mean().item(),
        "mass_of_exact_worst_head": of_exact.min().item(),
    }
