"""Generation: transformers' greedy tokens, batches, end tokens, the README example, teacher forcing, bad input."""

import pytest
import torch
from comparison import greedy_tokens, left_padded, relative_error
from transformers import AutoModelForCausalLM

from cache_hub import WaveIndexCache, memory
from config import RetroInferConfig, generate_config
from model_hub import Prefix, load_model, load_tokenizer

FULL = generate_config("SmolLM2-135M-Instruct", 100, "Full_Flash_Attn")


def generate(llm, ids, mask, count, **options):
    return llm.generate("Full_Flash_Attn", ids, mask, count, FULL, **options)


@pytest.fixture
def tiny(tiny_folder):
    return load_model(str(tiny_folder("llama")), 512, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["llama-tied-llama3-rope", "qwen2", "qwen3"])
def test_greedy_tokens_of_tiny_models(name, tiny_folder):
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder(name), dtype=torch.float32)
    llm = load_model(str(tiny_folder(name)), 512, torch.float32, "cpu")
    ids, mask = left_padded([60, 37], llm.spec.vocab_size)
    assert generate(llm, ids, mask, 64) == greedy_tokens(reference, ids, mask, 64)


def test_greedy_tokens_of_smollm2(smollm2, smollm2_reference):
    llm, tokenizer = smollm2
    batch = tokenizer(["Once upon a time, in a town by the sea,"], return_tensors="pt")
    expected = greedy_tokens(smollm2_reference, batch.input_ids, batch.attention_mask, 64)
    assert generate(llm, batch.input_ids, batch.attention_mask, 64) == expected


def test_readme_example(tiny_folder):
    model_name, device, dtype, max_seq_len, gen_len = str(tiny_folder("llama")), "cpu", torch.float32, 512, 5
    attn_type, retrieval_budget, estimation_budget, cache_ratio = "RetroInfer", 0.018, 0.232, 0.0
    prompts = ["A long prompt about nothing, said twice. " * 8, "A short prompt"]

    tokenizer = load_tokenizer(model_name)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    llm = load_model(model_name, max_seq_len, dtype, device, tokenizer)
    attn_config = generate_config(
        model_name,
        inputs.input_ids.shape[1],
        attn_type,
        retrieval_budget,
        estimation_budget,
        cache_ratio,
        use_cuda_graph=False,
        gpu_only=False,
    )
    out = llm.generate(
        attention_type=attn_type,
        inputs_ids=inputs.input_ids.to(llm.layers[0].device),
        attention_masks=inputs.attention_mask,
        max_new_length=gen_len,
        attn_config=attn_config,
    )
    assert [len(tokens) for tokens in out] == [gen_len, gen_len]
    assert all(isinstance(text, str) for text in tokenizer.batch_decode(out, skip_special_tokens=True))


def test_unequal_prompts_give_the_tokens_of_each_alone(tiny):
    ids, mask = left_padded([80, 3, 41], tiny.spec.vocab_size)
    together = generate(tiny, ids, mask, 20)
    alone = [generate(tiny, ids[row : row + 1, -length:], None, 20)[0] for row, length in enumerate([80, 3, 41])]
    assert together == alone


@pytest.mark.parametrize("estimation", ["none", "centroid", "softmax_lift"])
def test_greedy_tokens_while_generated_ones_enter_the_index(estimation, tiny):
    ids, mask = left_padded([150, 41], tiny.spec.vocab_size)
    graph = {"top_k": 210, "insert_batch": 8, "estimation": estimation, "index_dtype": "auto"}
    overrides = {f"attention_aware_graph.{key}": value for key, value in graph.items()}
    config = generate_config("tiny", 210, "RetroInfer", overrides={"static_pattern_end": 16, **overrides})
    expected = generate(tiny, ids, mask, 60)
    assert tiny.generate("RetroInfer", ids, mask, 60, config) == expected
    assert tiny.cache.stats.seconds["insert"] > 0


@pytest.mark.parametrize("prefill_bsz", [1, 2, 8])
def test_prefill_groups_do_not_change_the_tokens(prefill_bsz, tiny):
    ids, _ = left_padded([50] * 5, tiny.spec.vocab_size)
    alone = [generate(tiny, ids[row : row + 1], None, 12)[0] for row in range(5)]
    assert generate(tiny, ids, None, 12, prefill_bsz=prefill_bsz) == alone
    assert tiny.timing.decode_steps == 11
    assert tiny.cache.context_lengths(0) == [61] * 5


def test_the_wave_index_with_every_cluster_retrieved_gives_the_tokens_of_full_attention(tiny, monkeypatch):
    monkeypatch.setattr(WaveIndexCache, "update_tokens", 64)
    ids, mask = left_padded([300, 60, 211], tiny.spec.vocab_size)
    config = generate_config("unheard-of", 300, "RetroInfer", 1.0, retrieval_strategy="wave_index")
    tokens = tiny.generate("RetroInfer", ids, mask, 100, config)
    assert tiny.cache.index_bytes > 0
    assert tiny.cache.stats.seconds["update"] > 0
    assert tokens == generate(tiny, ids, mask, 100)


def test_the_wave_index_at_its_defaults_drops_tokens_and_generates(tiny, monkeypatch):
    monkeypatch.setattr(WaveIndexCache, "update_tokens", 64)
    ids, _ = left_padded([400, 400], tiny.spec.vocab_size)
    config = generate_config("unheard-of", 400, "RetroInfer", retrieval_strategy="wave_index")
    alone = [tiny.generate("RetroInfer", ids[row : row + 1], None, 100, config)[0] for row in range(2)]
    assert tiny.generate("RetroInfer", ids, None, 100, config, prefill_bsz=2) == alone
    assert tiny.cache.stats.attended_share < 0.5
    assert tiny.cache.stats.estimated > 0


def test_end_tokens(tiny):
    ids, mask = left_padded([30, 22], tiny.spec.vocab_size)
    free = generate(tiny, ids, mask, 30)
    stop = free[0][7]
    tiny.eos_ids = frozenset({stop})
    assert generate(tiny, ids, mask, 30, ignore_eos=True) == free
    cut = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in free]
    assert generate(tiny, ids, mask, 30, ignore_eos=False) == cut
    assert len(cut[0]) <= 8


def test_decoding_stops_once_all_sequences_have_ended(tiny):
    ids, _ = left_padded([30], tiny.spec.vocab_size)
    tokens = generate(tiny, ids, None, 30)[0]
    tiny.eos_ids = frozenset({tokens[3]})
    generate(tiny, ids, None, 30, ignore_eos=False)
    assert tiny.timing.decode_steps == tokens.index(tokens[3])


def test_forced_tokens_give_the_logits_of_one_forward(tiny):
    ids, mask = left_padded([60, 45], tiny.spec.vocab_size)
    expected = tiny.logits(ids, mask)
    prompts = ids[:, :-10], mask[:, :-10]
    settings = RetroInferConfig(**FULL["RetroInfer"])
    cache = tiny.init_cache("full", settings, lengths=[50, 35], max_new_length=10)
    steps = [tiny.prefill(*prompts, cache)]
    steps += [tiny.decode_step(ids[:, position], cache) for position in range(50, 60)]
    assert relative_error(torch.stack(steps, dim=1), expected[:, 49:]) < 1e-5
    with pytest.raises(ValueError, match="full"):
        tiny.decode_step(ids[:, 0], cache)


def test_decode_step_wants_a_prefilled_cache(tiny):
    cache = tiny.init_cache("full", RetroInferConfig(**FULL["RetroInfer"]), [5], 3)
    with pytest.raises(ValueError, match="prefilled"):
        tiny.decode_step(torch.tensor([1]), cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_ids": torch.zeros((1, 0), dtype=torch.long)}, "empty"),
        ({"inputs_ids": torch.zeros(4, dtype=torch.long)}, r"\[batch, length\]"),
        ({"inputs_ids": torch.full((1, 4), 260)}, "260..260; allowed: 0..259"),
        ({"attention_masks": torch.tensor([[0, 0, 0, 0]])}, "prompt 0 of the batch is empty"),
        ({"attention_masks": torch.tensor([[1, 1, 1, 0]])}, "left-padded"),
        ({"attention_masks": torch.tensor([[1, 0, 1, 1]])}, "left-padded"),
        ({"attention_masks": torch.ones(1, 5)}, r"\[1, 5\].*\[1, 4\]"),
        ({"max_new_length": 0}, "at least 1, got 0"),
        ({"max_new_length": 509}, "together 513; the model was loaded with max_len 512"),
        ({"prefill_bsz": 0}, "prefill_bsz"),
        ({"prefill_method": "xattn"}, "'xattn'.*allowed: 'full'"),
        ({"attention_type": "MInference"}, "MInference"),
        ({"attn_config": {}}, "generate_config"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
    ],
)
def test_bad_input_is_refused(change, message, tiny):
    arguments = {
        "attention_type": "Full_Flash_Attn",
        "inputs_ids": torch.tensor([[1, 2, 3, 4]]),
        "attention_masks": None,
        "max_new_length": 2,
        "attn_config": FULL,
    }
    with pytest.raises(ValueError, match=message):
        tiny.generate(**(arguments | change))
    assert tiny.cache is None


def test_too_little_memory_is_said_before_the_prompt_is_read(tiny, monkeypatch):
    settings = RetroInferConfig()
    ids, _ = left_padded([60, 60], tiny.spec.vocab_size)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(tiny, "_prefill_batch", lambda *a: pytest.fail("the prompt was read"))
    with pytest.raises(ValueError, match=r"^full with a prompt of 60 tokens and 5 new ones, x 2: needs .* no prompt"):
        generate(tiny, ids, None, 5)
    with pytest.raises(ValueError, match=r"^flat with a prompt of 60 tokens"):
        Prefix.prefill(tiny, "flat", settings, ids[:1], 5)
    with pytest.raises(ValueError, match=r"^flat and full with a prompt of 60 tokens"):
        tiny.init_caches([("flat", settings), ("full", settings)], [60], 5)
    tiny.init_cache("flat", settings, [60], 5, from_files=True)
