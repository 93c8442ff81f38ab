"""Loading: names, folders, LoRA, what is refused before weights are read."""

import json

import pytest
import torch
from comparison import left_padded, reference_logits, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from model_hub import ModelSpec, load_model, load_tokenizer
from model_hub.convert import build_llm


@pytest.fixture
def changed_config(tiny_folder, tmp_path):
    """A folder with the tiny Qwen2 model's configuration, changed, and no weights."""

    def write(**changes):
        config = json.loads((tiny_folder("qwen2") / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def test_tokenizer_pads_left_with_the_end_token(tiny_folder):
    tokenizer = load_tokenizer(str(tiny_folder("llama")))
    batch = tokenizer(["abc", "a"], return_tensors="pt", padding=True)
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.input_ids[1, 0] == tokenizer.eos_token_id


def test_end_tokens_come_from_model_and_tokenizer(tiny_folder):
    folder = str(tiny_folder("llama"))
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = "A"
    llm = load_model(folder, 512, "fp32", "cpu", tokenizer)
    assert llm.eos_ids == {256, tokenizer.convert_tokens_to_ids("A")}


def test_lora_is_merged_as_peft_merges_it(tiny_folder, tmp_path):
    folder = tiny_folder("qwen2")
    torch.manual_seed(1)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, lora_alpha=16, target_modules=modules, init_lora_weights=False),
    )
    lora.save_pretrained(tmp_path)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
    ids, mask = left_padded([60, 20], 256)
    expected = reference_logits(reference, ids, mask)
    merged = load_model(str(folder), 512, "fp32", "cpu", lora=tmp_path).logits(ids, mask)
    plain = load_model(str(folder), 512, "fp32", "cpu", lora="none").logits(ids, mask)
    assert relative_error(merged, expected) < 1e-4
    assert relative_error(plain, expected) > 1e-2


def test_rope_json_of_a_lora_folder_sets_base_and_window(tiny_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    (tmp_path / "rope.json").write_text('{"rope_theta": 77.0, "max_position_embeddings": 1024}')
    llm = load_model(str(tiny_folder("llama")), 1000, "fp32", "cpu", lora=str(tmp_path))
    assert llm.spec.window == 1024
    assert torch.allclose(llm.frequencies, 77.0 ** -(torch.arange(0, 16, 2) / 16))


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./nothing", "../nothing", "a/b/c", "a/b.gguf", "missing.gguf", "nosuchfolder"]
)
@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_model(name, 64, "fp32", "cpu")])
def test_missing_models_are_named(name, load):
    with pytest.raises(FileNotFoundError, match=f"model {name} does not exist.*a folder with config.json"):
        load(name)


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(str(tmp_path), 64, "fp32", "cpu")


def test_missing_lora_folder(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_model(str(tiny_folder("llama")), 64, "fp32", "cpu", lora=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((513, "fp32", "cpu"), "max_len 513 is above the 512 positions"),
        ((0, "fp32", "cpu"), "at least 1, got 0"),
        ((64, "int8", "cpu"), "'int8'.*fp16, bf16, fp32"),
        ((64, torch.float64, "cpu"), r"torch\.float64.*fp16, bf16, fp32"),
        ((64, "fp32", "cuda:99"), "'cuda:99'.*cpu"),
        ((64, "fp32", "tpu"), "'tpu'.*cpu"),
    ],
)
def test_bad_arguments(arguments, message, tiny_folder):
    with pytest.raises(ValueError, match=message):
        load_model(str(tiny_folder("llama")), *arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; allowed: llama, qwen2, qwen3"),
        ({"model_type": None}, "allowed: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}, "sliding"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_models_computed_wrongly_are_refused(changes, message, changed_config):
    with pytest.raises(ValueError, match=message):
        load_model(changed_config(**changes), 64, "fp32", "cpu")


def test_yarn_widens_the_window(tiny_folder):
    assert load_model(str(tiny_folder("qwen2-untied-yarn")), 512, "fp32", "cpu").spec.window == 512


def test_auto_device_and_layer_mapping(tiny_folder):
    llm = load_model(str(tiny_folder("llama")), 64, "fp32", "auto")
    assert list(llm.layer_mapping) == ["0", "1", "2"]
    assert llm.layer_mapping["0"] == str(llm.layers[0].device)


def test_layers_are_split_evenly_and_in_order_over_devices():
    model = tiny_model("llama-tied-llama3-rope")
    devices = [torch.device("cpu"), torch.device("meta")]
    llm = build_llm(model, ModelSpec.from_config(model.config, "tiny"), 64, torch.float32, devices, ())
    assert llm.layer_mapping == {"0": "cpu", "1": "cpu", "2": "meta"}
    assert [str(part.device) for part in (llm.embedding, llm.norm, llm.lm_head)] == ["cpu", "meta", "meta"]
