"""Attention arithmetic: dense prefill, and decode attention over weighted rows of any KV store."""

from attn_hub.decode import decode_splits, weighted_decode_attention
from attn_hub.parts import WeightedPart
from attn_hub.prefill import full_prefill_attn
from attn_hub.rows import copy_rows

__all__ = ["WeightedPart", "copy_rows", "decode_splits", "full_prefill_attn", "weighted_decode_attention"]
