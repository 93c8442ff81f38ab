"""Sampling: greedy, the cuts, the temperature, and refused settings."""

import pytest
import torch

from model_hub import Sampler

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def drawn(sampler, count=4000):
    torch.manual_seed(2025)
    return torch.bincount(sampler(LOGITS.expand(count, 4)), minlength=4) / count


def test_greedy_takes_the_best():
    assert Sampler()(LOGITS.flip(1)).tolist() == [3]


def test_top_k_cuts_to_the_best():
    shares = drawn(Sampler(True, temperature=1.0, top_p=1.0, top_k=2))
    assert torch.allclose(shares, torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.03)


def test_top_p_keeps_the_smallest_set_with_that_mass():
    shares = drawn(Sampler(True, temperature=1.0, top_p=0.74, top_k=0))
    assert shares[2] == shares[3] == 0
    assert shares[1] > 0.3
    assert drawn(Sampler(True, temperature=1.0, top_p=0.76, top_k=0))[2] > 0.1


def test_temperature_sharpens():
    expected = (LOGITS[0] / 0.5).softmax(-1)
    assert torch.allclose(drawn(Sampler(True, temperature=0.5, top_p=1.0, top_k=0)), expected, atol=0.03)


def test_top_k_above_the_vocabulary_is_no_cut():
    assert (drawn(Sampler(True, temperature=1.0, top_p=1.0, top_k=100)) > 0.05).all()


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_bad_settings_are_refused(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Sampler(True, **setting)
