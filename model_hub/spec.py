"""What the decoder must know about a model, taken out of its transformers configuration."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from model_hub.rotary import rope_frequencies

FAMILIES = ("llama", "qwen2", "qwen3")


def check_family(model_type: str | None, name: str) -> None:
    """ValueError when the model is none of the families this decoder computes."""
    if model_type not in FAMILIES:
        raise ValueError(f"{name}: model type {model_type!r} is not supported; allowed: {', '.join(FAMILIES)}")


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """Shape of a decoder. `frequencies` [head_dim / 2] float32 and `rope_scaling` are the rotary embedding's;
    `window` is the number of positions the model was made for."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layer_num: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    window: int
    frequencies: Tensor
    rope_scaling: float

    @classmethod
    def from_config(cls, config: PretrainedConfig, name: str, rope_divisors: Tensor | None = None) -> "ModelSpec":
        """Reads a transformers configuration.

        rope_divisors [head_dim / 2]: what GGUF files of Llama 3.1 state in place of the scaling's parameters.
        Raises ValueError, naming `name`, for what this decoder would compute wrongly: another family, activation or
        rope type, sliding-window layers, quantised checkpoints.
        """
        check_family(config.model_type, name)
        if config.hidden_act != "silu":
            raise ValueError(f"{name}: activation {config.hidden_act!r} is not supported; allowed: 'silu'")
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError(f"{name}: sliding-window layers are not supported; set use_sliding_window to false")
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{name}: quantised checkpoints are not supported, except GGUF files")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frequencies, scaling = rope_frequencies(config, head_dim)
        return cls(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            layer_num=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=head_dim,
            norm_eps=config.rms_norm_eps,
            window=_window(config),
            frequencies=frequencies if rope_divisors is None else frequencies / rope_divisors,
            rope_scaling=scaling,
        )


def _window(config: PretrainedConfig) -> int:
    rope = config.rope_parameters
    if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        # Qwen2.5's configurations keep the unscaled length in max_position_embeddings
        return max(config.max_position_embeddings, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return config.max_position_embeddings
