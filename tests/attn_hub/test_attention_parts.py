"""Every field of a WeightedPart that does not fit is refused with what was given and what is allowed."""

import pytest
import torch
from attention_cases import random_store

from attn_hub import WeightedPart, weighted_decode_attention

B, HKV, G, N, D = 2, 2, 3, 10, 64
H = HKV * G
QUERY = torch.zeros(B, 1, H, D)
STORE = torch.zeros(B, HKV, N, D)
IDS = torch.zeros(B, HKV, 4, dtype=torch.int32)


def _part(**fields) -> WeightedPart:
    return WeightedPart(**({"keys": STORE, "values": STORE} | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keys": STORE[0]}, r"keys are \[2, 10, 64\], must be \[B=2, Hkv, N, D=64\]"),
        ({"keys": STORE[:1]}, r"keys are \[1, 2, 10, 64\]"),
        ({"keys": STORE[..., :32]}, r"keys are \[2, 2, 10, 32\]"),
        ({"values": STORE[:, :, :9]}, r"values are \[2, 2, 9, 64\], must have the keys' shape \[2, 2, 10, 64\]"),
        ({k: torch.zeros(B, 4, N, D) for k in ("keys", "values")}, "6 query heads are not a multiple of 4 kv heads"),
        ({k: torch.zeros(B, 0, N, D) for k in ("keys", "values")}, "6 query heads are not a multiple of 0 kv heads"),
        (
            {"keys": torch.zeros(B, HKV, D, N).mT},
            "keys have stride 10 in the last dimension, must be 1",
        ),
        ({"ids": IDS[0]}, r"ids are \[2, 4\], must be \[2, 2, T\] or \[2, 6, T\]"),
        ({"ids": IDS[:, :1]}, r"ids are \[2, 1, 4\]"),
        ({"ids": IDS, "log_weights": torch.zeros(N)}, r"log_weights are \[10\], must broadcast to \[2, 6, 4\]"),
        ({"log_weights": torch.zeros(1, B, H, N)}, r"log_weights are \[1, 2, 6, 10\]"),
        ({"log_weights": torch.zeros(B, 3, N)}, r"log_weights are \[2, 3, 10\]"),
        ({"ids": IDS, "lengths": torch.full((B, HKV), 4)}, "lengths and ids are both given"),
        ({"lengths": torch.full((B, H), 4)}, r"lengths are \[2, 6\], must be \[2, 2\]"),
    ],
)
def test_wrong_shapes(fields, message):
    with pytest.raises(ValueError, match=rf"part 0: .*{message}"):
        weighted_decode_attention(QUERY, [_part(**fields)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keys": STORE.double()}, "keys are torch.float64, values torch.float32; both must be one of float32"),
        ({"values": STORE.half()}, "keys are torch.float32, values torch.float16"),
        ({"ids": IDS.float()}, "ids are torch.float32 on cpu, must be int32 or int64 on cpu"),
        ({"ids": IDS.bool()}, "ids are torch.bool"),
        ({"log_weights": torch.zeros(N, dtype=torch.int64)}, "log_weights are torch.int64 on cpu, must be floating"),
        ({"lengths": torch.full((B, HKV), 4.0)}, "lengths are torch.float32 on cpu, must be int32 or int64"),
    ],
)
def test_wrong_dtypes(fields, message):
    with pytest.raises(TypeError, match=rf"part 0: .*{message}"):
        weighted_decode_attention(QUERY, [_part(**fields)])


def test_the_message_names_the_part():
    with pytest.raises(ValueError, match="part 1: ids are"):
        weighted_decode_attention(QUERY, [_part(), _part(ids=IDS[0])])


def test_wrong_queries():
    with pytest.raises(ValueError, match=r"query is \[2, 2, 6, 64\], must be \[B, 1, H, D\]"):
        weighted_decode_attention(QUERY.expand(B, 2, H, D), [_part()])
    with pytest.raises(TypeError, match=r"query is torch.float64, must be one of float32, bfloat16, float16"):
        weighted_decode_attention(QUERY.double(), [_part()])
    with pytest.raises(ValueError, match="parts is empty"):
        weighted_decode_attention(QUERY, [])


def test_a_store_elsewhere():
    with pytest.raises(ValueError, match="keys are on meta, must be on cpu"):
        weighted_decode_attention(QUERY, [_part(keys=STORE.to("meta"))])


def test_kernels_check_too(kernels):
    query, store = QUERY.to(kernels.device), random_store(B, HKV, N, D).to(kernels.device)
    with pytest.raises(ValueError, match="part 0: lengths and ids are both given"):
        kernels(query, [WeightedPart(store, store, IDS.to(kernels.device), lengths=IDS[..., 0].to(kernels.device))])
