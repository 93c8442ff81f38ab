"""Attention arithmetic: dense prefill, and decode attention over weighted rows of any KV store."""

from attn_hub.decode import decode_splits, weighted_decode_attention
from attn_hub.hand_over import append_token, post
from attn_hub.parts import WeightedPart
from attn_hub.prefill import full_prefill_attn
from attn_hub.rotate import rotate
from attn_hub.rows import copy_rows

__all__ = [
    "WeightedPart",
    "append_token",
    "copy_rows",
    "decode_splits",
    "full_prefill_attn",
    "post",
    "rotate",
    "weighted_decode_attention",
]
