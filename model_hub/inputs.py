"""Checks of what the user hands to generation: everything wrong is said before work starts."""

import torch
from torch import Tensor


def valid_lengths(ids: Tensor, masks: Tensor | None, vocab_size: int) -> list[int]:
    """Number of valid tokens of each sequence of a left-padded batch.

    ids: [B, L] integer token ids; masks: [B, L], non-zero at valid tokens, or None when all are valid.
    Raises ValueError for other shapes, an empty prompt, padding elsewhere than left, ids outside the vocabulary.
    """
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"token ids must be integers [batch, length], got {ids.dtype} {list(ids.shape)}")
    if masks is not None and masks.shape != ids.shape:
        raise ValueError(f"attention mask {list(masks.shape)} does not fit token ids {list(ids.shape)}")
    valid = torch.ones(ids.shape, dtype=torch.bool) if masks is None else masks.detach().cpu().bool()
    lengths = valid.sum(dim=1).tolist()
    if not lengths or min(lengths) == 0:
        which = f"prompt {lengths.index(0)} of the batch is empty" if lengths else "the batch is empty"
        raise ValueError(f"{which}: every prompt needs at least one token")
    for row, length in enumerate(lengths):
        if not valid[row, -length:].all():
            raise ValueError(f"prompt {row} of the batch is not left-padded: its mask must be 0s, then {length} 1s")
    used = ids.detach().cpu()[valid]
    if used.min() < 0 or used.max() >= vocab_size:
        raise ValueError(f"token ids span {int(used.min())}..{int(used.max())}; allowed: 0..{vocab_size - 1}")
    return lengths


def check_room(lengths: list[int], max_new_length: int, max_length: int, window: int) -> None:
    """ValueError when the longest prompt and the new tokens do not fit into the length the model was loaded for."""
    if max_new_length < 1:
        raise ValueError(f"max_new_length must be at least 1, got {max_new_length}")
    if max(lengths) + max_new_length > max_length:
        raise ValueError(
            f"the longest prompt has {max(lengths)} tokens and {max_new_length} new ones are asked for, together "
            f"{max(lengths) + max_new_length}; the model was loaded with max_len {max_length} (its window: {window})"
        )
