"""Rotary position embedding (Su et al. 2021), with the frequency scalings transformers knows for these families."""

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_frequencies(config: PretrainedConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32 and the factor on cos and sin, out of `config.rope_parameters`.

    Raises ValueError for a rope type whose frequencies depend on the prompt's length, or that rotates part of a head.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; allowed: {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported; allowed: 1.0")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.float(), float(scaling)


def cos_sin(positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [*positions.shape, 1, head_dim / 2] in `dtype`; angles are float32. The 1 is the heads' place."""
    angles = (positions[..., None].float() * frequencies)[..., None, :]
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
