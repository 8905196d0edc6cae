"""randomness.py: noise is a function of its key."""

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_vdm.randomness import key_to_seed, keyed_generator, keyed_noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (15,), (16,), (2, 3, 5, 7)])
def test_keyed_noise_is_that_of_each_key_alone(shape, dtype):
    keys = [(0, 1, 2), (0, 12), ("0", 1, 3), (5,), ("images", 7)]
    like = torch.empty(0, dtype=dtype)
    noise = keyed_noise(keys, shape, like)
    assert noise.shape == (5, *shape) and noise.dtype == dtype
    for row, key in zip(noise, keys, strict=True):
        source = torch.Generator().manual_seed(key_to_seed(*key))
        assert torch.equal(row, torch.randn(shape, generator=source).to(dtype))
        assert torch.equal(row, torch.randn(shape, generator=keyed_generator(*key)).to(dtype))
        assert torch.equal(row, keyed_noise([key], shape, like)[0])
    assert torch.equal(keyed_noise(keys[::-1], shape, like).flip(0), noise)
    assert len(noise.flatten(1).sum(1).unique() if shape else noise.unique()) == 5


def test_keys_that_differ_are_seeds_that_differ():
    keys = [(a, b, c) for a in range(12) for b in range(12) for c in range(12)] + [(1, 23), (12, 3), (123,)]
    seeds = {key_to_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert stats.kstest(np.array(sorted(seeds)) / 2**63, "uniform").pvalue > 1e-3
    # this value must never change: evaluations of an older version are resumed with it
    assert key_to_seed(0, 1, 2) == 3662037204992188296
