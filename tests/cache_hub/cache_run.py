"""Random states fed to a cache as a model would, and plain softmax attention over the same tokens."""

from typing import Any

import numpy as np
import torch

from cache_hub import KV_Cache

LAYERS, STEPS = 2, 5


class Run:
    """Prompts and generated tokens of random states, fed to a cache as a model would."""

    def __init__(
        self,
        lengths: list[int],
        group: int = 3,
        kv_heads: int = 2,
        dim: int = 64,
        device: str = "cpu",
        steps: int = STEPS,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.steps = device, steps
        self.lengths, self.group, self.kv_heads, self.dim = lengths, group, kv_heads, dim
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
        total, heads, batch = max(lengths) + steps, group * kv_heads, len(lengths)
        # Left-padded prompts followed by generated tokens.
        self.q = draw(LAYERS, batch, total, heads, dim)
        self.k = draw(LAYERS, batch, total, kv_heads, dim)
        self.v = draw(LAYERS, batch, total, kv_heads, dim)
        self.pads = [max(lengths) - length for length in lengths]

    def common(self, **changes: Any) -> dict[str, Any]:
        return {
            "valid_start": np.array(self.pads),
            "layer_num": LAYERS,
            "batch_size": len(self.lengths),
            "max_length": max(self.lengths) + self.steps,
            "num_key_value_heads": self.kv_heads,
            "num_heads": self.kv_heads * self.group,
            "head_dim": self.dim,
            "dtype": torch.float32,
            "layer_mapping": {str(layer): self.device for layer in range(LAYERS)},
            "prefill_bsz": 1,
            "num_gpus": 0,
            "model_size": 8,
            "max_new_length": self.steps,
            **changes,
        }

    def prefill(self, cache: KV_Cache, together: int = 1) -> None:
        """Prompts in calls of `together` sequences, which must be equally long."""
        prompt = max(self.lengths)
        for b, length in list(enumerate(self.lengths))[::together]:
            for layer in range(LAYERS):
                q, k, v = (states[layer, b : b + together, :prompt] for states in (self.q, self.k, self.v))
                valid_k, valid_v = cache.prefill_update_kv_cache(q, k, v, layer, b)
                assert torch.equal(valid_k, k[:, -length:])
                assert torch.equal(valid_v, v[:, -length:])
                cache.sync(layer, b)
        cache.prepare_cache()

    def decode(self, cache: KV_Cache) -> torch.Tensor:
        """Outputs [steps, LAYERS, B, H, D]."""
        outs = []
        for step in range(self.steps):
            at = slice(max(self.lengths) + step, max(self.lengths) + step + 1)
            for layer in range(LAYERS):
                cache.decode_update_kv_cache(self.k[layer, :, at], self.v[layer, :, at], layer)
                outs.append(cache.compute(self.q[layer, :, at], layer)[:, 0])
        return torch.stack(outs).unflatten(0, (self.steps, LAYERS))

    def full_attention(self) -> torch.Tensor:
        outs = torch.empty(self.steps, LAYERS, len(self.lengths), self.kv_heads * self.group, self.dim)
        for step, layer, b in np.ndindex(self.steps, LAYERS, len(self.lengths)):
            tokens = slice(self.pads[b], max(self.lengths) + step + 1)
            k, v = (states[layer, b, tokens].repeat_interleave(self.group, 1).double() for states in (self.k, self.v))
            q = self.q[layer, b, max(self.lengths) + step].double()
            weights = torch.einsum("hd,nhd->hn", q, k).div(self.dim**0.5).softmax(1)
            outs[step, layer, b] = torch.einsum("hn,nhd->hd", weights, v).float()
        return outs.to(self.device)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
