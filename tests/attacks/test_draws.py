"""Per-image random numbers: distribution, independence, and indifference to batching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.attacks.draws import Draws

KEYS = torch.arange(500)
SEEDS = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, order=st.permutations(range(6)), stream=st.integers(0, 10_000))
def test_numbers_belong_to_the_key_whatever_the_batch(seed, order, stream):
    keys = torch.tensor([0, 7, -3, 2**40, 8, 1])
    draws = Draws(seed, keys)
    together = draws.uniform((2, 3), stream)
    shuffled = draws.rows(torch.tensor(order)).uniform((2, 3), stream)
    assert torch.equal(shuffled, together[list(order)])
    alone = Draws(seed, keys[3:4]).uniform((2, 3), stream)
    assert torch.equal(alone[0], together[3])


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_uniform_numbers_have_the_moments_of_the_uniform(seed):
    numbers = Draws(seed, KEYS).uniform((400,), 3).double()
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    # 200 000 numbers: standard error of the mean 6.5e-4, of the variance 1.7e-4.
    assert abs(numbers.mean() - 0.5) < 4e-3
    assert abs(numbers.var() - 1 / 12) < 1e-3
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 10_000).square() / 10_000).sum() < 45  # chi squared, 19 degrees: p = 0.0007


def test_normal_numbers_have_the_moments_of_the_normal():
    numbers = Draws(5, KEYS).normal((400,), 0).double()
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.var() - 1) < 0.015
    assert abs((numbers**4).mean() - 3) < 0.08
    assert torch.isfinite(numbers).all()


def test_signs_are_even():
    signs = Draws(5, KEYS).signs((400,), 0)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.01


@pytest.mark.parametrize(
    "other",
    [
        Draws(5, KEYS).uniform((400,), 2),
        Draws(6, KEYS).uniform((400,), 1),
        Draws(5, KEYS + 1).uniform((400,), 1),
        Draws(5, KEYS).fork(0).uniform((400,), 1),
        Draws(5, KEYS).uniform((401,), 1)[:, 1:],
    ],
    ids=["stream", "seed", "key", "fork", "position"],
)
def test_streams_seeds_keys_forks_and_positions_are_uncorrelated(other):
    base = Draws(5, KEYS).uniform((400,), 1)
    pair = torch.stack([base.flatten(), other.flatten()]).double()
    assert abs(torch.corrcoef(pair)[0, 1]) < 0.012
