"""What the proofs compare with: transformers' own forward and generate."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def left_padded(lengths: list[int], vocab_size: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths: ids and mask [B, max length]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(0, min(vocab_size, 256), (len(lengths), width), generator=generator)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids, mask


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits * mask[..., None]


def greedy_tokens(model: PreTrainedModel, ids: Tensor, mask: Tensor, count: int) -> list[list[int]]:
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :].tolist()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference as a share of the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())
