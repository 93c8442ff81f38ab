"""What a static zone holds after tokens came and went, for sequences of equal and of different lengths."""

import pytest
import torch

from cache_hub.static_zone import StaticZone


@pytest.mark.parametrize("counts", [[0], [5, 5, 5], [1, 7, 4]])
def test_every_sequence_keeps_its_own_tokens_in_order(counts: list[int]) -> None:
    torch.manual_seed(0)
    batch = len(counts)
    zone = StaticZone(batch, 2, 8, 64, torch.float32, torch.device("cpu"))
    kept = [torch.randn(2, 2, count, 64) for count in counts]  # keys and values of each sequence
    for b, (keys, values) in enumerate(kept):
        zone.put(slice(b, b + 1), keys[None], values[None])
    for step in range(6):  # beyond the capacity
        key_states, value_states = torch.randn(2, batch, 1, 2, 64)
        zone.append(key_states, value_states)
        if step == 3:
            zone.drop_last(1)
            continue
        for b in range(batch):
            states = torch.stack((key_states[b, 0], value_states[b, 0]))[:, :, None]
            kept[b] = torch.cat((kept[b], states), 2)
    assert zone.counts == [count + 5 for count in counts]
    lengths = zone.part().lengths
    assert lengths is not None
    assert lengths.tolist() == [[count, count] for count in zone.counts]
    for b, (keys, values) in enumerate(kept):
        assert torch.equal(zone.keys[b, :, : zone.counts[b]], keys)
        assert torch.equal(zone.values[b, :, : zone.counts[b]], values)
