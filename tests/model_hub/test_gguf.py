"""GGUF files: what was written comes back as the same model; foreign and damaged files are refused."""

import gguf
import numpy as np
import pytest
import torch
from comparison import left_padded, reference_logits, relative_error
from tiny_models import LLAMA3_ROPE, tiny_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model_hub import load_model, load_tokenizer

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(path, model, architecture, drop=(), extra=None, **metadata):
    """Writes a transformers model as llama.cpp's converter does: its names, and Llama's q and k with paired rows."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(256)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    inner = {new: old for old, new in LAYER_NAMES.items()}
    outer = {new: old for old, new in OUTER_NAMES.items()}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name in outer:
            written = outer[name]
        else:
            _, _, layer, *part, kind = name.split(".")
            written = f"blk.{layer}.{inner['.'.join(part)]}.{kind}"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        if written not in drop:
            writer.add_tensor(written, weight.contiguous().numpy())
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize(
    ("name", "architecture"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("qwen3-tied", "qwen3")]
)
def test_round_trip(name, architecture, tmp_path):
    model = tiny_model(name)
    llm = load_model(write_gguf(tmp_path / "tiny.gguf", model, architecture), 512, "fp32", "cpu")
    ids, mask = left_padded([80, 33], 256)
    assert relative_error(llm.logits(ids, mask), reference_logits(model, ids, mask)) < 1e-4
    assert llm.eos_ids == {256}


def test_llama3_rope_factors_are_read(tmp_path):
    model = tiny_model("llama-tied-llama3-rope")
    plain = 1.0 / LLAMA3_ROPE["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    divisors = {"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}
    llm = load_model(write_gguf(tmp_path / "tiny.gguf", model, "llama", extra=divisors), 512, "fp32", "cpu")
    ids, mask = left_padded([150], 256)
    assert relative_error(llm.logits(ids, mask), reference_logits(model, ids, mask)) < 1e-4


def test_rope_scaling_in_the_metadata_is_refused(tmp_path):
    scaling = {"rope_scaling_type": gguf.RopeScalingType.YARN, "rope_scaling_factor": 4.0}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2-untied-yarn"), "qwen2", **scaling)
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not read from GGUF files"):
        load_model(path, 512, "fp32", "cpu")


@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_model(name, 64, "fp32", "cpu")])
def test_other_architectures_are_refused(load, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"other\.gguf: model type 'mamba'.*allowed: llama, qwen2, qwen3"):
        load(str(tmp_path / "other.gguf"))


def test_missing_tensors_are_named(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), "llama", drop=["blk.1.ffn_up.weight"])
    with pytest.raises(ValueError, match=r"missing: .*'model.layers.1.mlp.up_proj.weight'"):
        load_model(path, 64, "fp32", "cpu")


def test_mixture_of_experts_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), "llama", expert_count=8)
    with pytest.raises(ValueError, match="mixture-of-experts"):
        load_model(path, 64, "fp32", "cpu")


@pytest.mark.parametrize("content", [b"", b"GG", b"not a gguf file at all" * 10])
def test_damaged_files_are_refused(content, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.gguf: not a readable GGUF file"):
        load_model(str(tmp_path / "bad.gguf"), 64, "fp32", "cpu")


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama"), "llama")
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(ValueError, match=r"tiny\.gguf: not a readable GGUF file"):
        load_model(str(path), 64, "fp32", "cpu")
