"""The entry point: 8 bits, budgets, chunks, keys, state per image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.attacks.adaptive import FixedRows
from acsr_ray.attacks.rounding import round_to_pixels, rounding_slack
from acsr_ray.attacks.run import Attacked, attack_uncapped, cap, is_fooled, run_attack
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.evaluation.quality import perturbation_norms

RELATIVE = {"norm": "relative_l2", "epsilon": 0.06}
CONFIGS = [
    AttackConfig(name="noise", **RELATIVE),
    AttackConfig(name="fgsm", **RELATIVE),
    AttackConfig(name="bim", steps=6, **RELATIVE),
    AttackConfig(name="pgd", steps=6, restarts=2, **RELATIVE),
    AttackConfig(name="apgd", steps=8, loss="dlr", **RELATIVE),
    AttackConfig(name="tpgd", steps=6, **RELATIVE),
    AttackConfig(name="square", queries=25, **RELATIVE),
    AttackConfig(name="cw", steps=40, **RELATIVE),
    AttackConfig(name="deepfool", steps=20, **RELATIVE),
]
LINF = [
    AttackConfig(name=name, epsilon=6 / 255, **more)
    for name, more in [("noise", {}), ("fgsm", {}), ("bim", {"steps": 5}), ("square", {"queries": 20})]
]
every_attack = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)


@pytest.mark.parametrize("config", [*CONFIGS, *LINF], ids=lambda config: config.label)
def test_images_are_stored_ones_within_the_budget_up_to_rounding(digits, config):
    images, labels = digits.head(30)
    result = run_attack(config, digits.model, images, labels, seed=0)
    assert torch.equal(result.rounded, round_to_pixels(result.rounded))
    assert 0 <= result.unrounded.min() <= result.unrounded.max() <= 1
    lengths = perturbation_norms(result.unrounded, images, config.norm)
    assert (lengths <= config.epsilon * (1 + 2e-4) + 1e-6).all()
    slack = rounding_slack(config.norm, images.shape[1:])
    if config.norm == "relative_l2":
        slack = slack / images.flatten(1).norm(dim=1).double()
    rounded = perturbation_norms(result.rounded, images, config.norm)
    assert (rounded <= config.epsilon * (1 + 2e-4) + 1e-6 + slack).all()
    if config.norm == "linf":
        # Images and radius are on the 8-bit grid, so rounding adds nothing.
        assert (rounded <= config.epsilon + 1e-6).all()
    assert not result.unrounded.requires_grad


@every_attack
def test_any_chunking_gives_the_same_images(digits, config):
    images, labels = digits.head(20)
    keys = torch.arange(100, 120)
    whole = run_attack(config, digits.model, images, labels, seed=3, keys=keys, batch_size=None)
    chunked = run_attack(config, digits.model, images, labels, seed=3, keys=keys, batch_size=7)
    # Products of other batch sizes round differently, and signs and minima amplify that on a few images.
    change = (whole.unrounded - chunked.unrounded).flatten(1).abs().amax(1)
    assert (change < 1e-3).sum() >= 18
    half = slice(10, 20)
    later = run_attack(config, digits.model, images[half], labels[half], seed=3, keys=keys[half])
    change = (whole.unrounded[half] - later.unrounded).flatten(1).abs().amax(1)
    assert (change < 1e-3).sum() >= 9


@every_attack
def test_state_per_image_follows_the_images(digits, config):
    """A model with a hidden offset per image is attacked as each image's own model would be."""
    images, labels = digits.head(12)
    offset = 0.1 * torch.randn(12, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    model = FixedRows(lambda x, shift: digits.model(x + shift), (offset,))
    together = run_attack(config, model, images, labels, seed=0, batch_size=5)
    alone = torch.cat(
        [
            run_attack(
                config,
                lambda x, n=n: digits.model(x + offset[n]),
                images[n : n + 1],
                labels[n : n + 1],
                seed=0,
                keys=torch.tensor([n]),
            ).unrounded
            for n in range(12)
        ]
    )
    change = (together.unrounded - alone).flatten(1).abs().amax(1)
    assert (change < 1e-3).sum() >= 11


def test_the_seed_and_the_key_decide_random_starts(digits):
    images, labels = digits.head(6)
    config = AttackConfig(name="pgd", epsilon=0.05, steps=1)

    def attacked(seed, keys=None):
        return run_attack(config, digits.model, images, labels, seed=seed, keys=keys).unrounded

    state = torch.get_rng_state()
    assert torch.equal(attacked(1), attacked(1))
    assert not torch.equal(attacked(1), attacked(2))
    assert not torch.equal(attacked(1), attacked(1, torch.arange(6) + 50))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["cw", "deepfool"])
def test_rounding_undoes_a_minimal_attack_and_the_ladder_redoes_it(digits, name):
    images, labels = digits.images, digits.labels
    plain = run_attack(AttackConfig(name=name, strengths=()), digits.model, images, labels, seed=0)
    raised = run_attack(AttackConfig(name=name), digits.model, images, labels, seed=0)
    assert torch.equal(raised.unrounded, plain.unrounded)
    assert torch.equal(plain.rounded, round_to_pixels(plain.unrounded))
    floats = is_fooled(digits.model, plain.unrounded, labels)
    before = is_fooled(digits.model, plain.rounded, labels)
    after = is_fooled(digits.model, raised.rounded, labels)
    assert floats.double().mean() > 0.95
    assert before.sum() < floats.sum() - 4
    assert after.sum() >= floats.sum() - 1
    # Images that rounding left fooled are not touched again.
    assert torch.equal(raised.rounded[before], plain.rounded[before])


@pytest.mark.parametrize("name", ["cw", "deepfool"])
def test_a_cap_scales_back_and_counts(digits, name):
    images, labels = digits.head(60)
    free = run_attack(AttackConfig(name=name), digits.model, images, labels, seed=0)
    lengths = perturbation_norms(free.unrounded, images, "relative_l2")
    epsilon = lengths.median().item()
    config = AttackConfig(name=name, norm="relative_l2", epsilon=epsilon)
    capped = run_attack(config, digits.model, images, labels, seed=0)
    beyond = lengths > epsilon * 1.001
    assert 20 < beyond.sum() < 40
    assert (capped.scaled_back | ~beyond).all()
    got = perturbation_norms(capped.unrounded, images, "relative_l2")
    torch.testing.assert_close(got, lengths.clamp(max=epsilon), rtol=3e-4, atol=1e-6)
    inside = ~capped.scaled_back
    assert torch.equal(capped.unrounded[inside], free.unrounded[inside])
    # Along the same line: only shorter.
    delta, full = (x.unrounded[beyond] - images[beyond] for x in (capped, free))
    cosine = torch.nn.functional.cosine_similarity(delta.flatten(1), full.flatten(1))
    assert (cosine > 0.9999).all()
    assert not is_fooled(digits.model, capped.unrounded[beyond], labels[beyond]).all()
    again = cap(attack_uncapped(config, digits.model, images, labels, seed=0), images, config.threat)
    assert torch.equal(again.rounded, capped.rounded)


def test_restarts_only_add_successes(digits):
    images, labels = digits.images, digits.labels
    weak = {"name": "square", "epsilon": 8 / 255, "queries": 15}
    once = run_attack(AttackConfig(**weak), digits.model, images, labels, seed=0)
    often = run_attack(AttackConfig(restarts=4, **weak), digits.model, images, labels, seed=0)
    first, later = (is_fooled(digits.model, x.rounded, labels) for x in (once, often))
    assert (later | ~first).all()
    assert later.sum() > first.sum()
    assert torch.equal(once.rounded[first], often.rounded[first])


def test_no_images_no_attack(digits):
    result = run_attack(CONFIGS[1], digits.model, digits.images[:0], digits.labels[:0], seed=0)
    assert isinstance(result, Attacked)
    assert len(result.rounded) == len(result.unrounded) == len(result.scaled_back) == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), r"\(N, 3, H, W\)"),
        (torch.zeros(2, 3, 4, 4) + 2, torch.zeros(2, dtype=torch.int64), r"in \[0, 1\], got \[2, 2\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.full((2, 3, 4, 4), torch.nan), torch.zeros(2, dtype=torch.int64), "finite"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64), r"labels must be \(2,\) int64"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), "float32"),
    ],
)
def test_bad_input_is_refused(digits, images, labels, message):
    with pytest.raises(ValueError, match=message):
        run_attack(CONFIGS[1], digits.model, images, labels, seed=0)


def test_keys_must_name_every_image(digits):
    images, labels = digits.head(4)
    with pytest.raises(ValueError, match=r"keys must be \(4,\)"):
        run_attack(CONFIGS[0], digits.model, images, labels, seed=0, keys=torch.arange(3))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), norm=st.sampled_from(["linf", "l2"]))
def test_rounding_lengthens_by_the_slack_at_most(seed, norm):
    generator = torch.Generator().manual_seed(seed)
    images = round_to_pixels(torch.rand(3, 3, 6, 5, generator=generator))
    attacked = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    before = perturbation_norms(attacked, images, norm)
    after = perturbation_norms(round_to_pixels(attacked), images, norm)
    assert (after <= before + rounding_slack(norm, (3, 6, 5)) + 1e-7).all()


def test_rounding_is_to_the_nearest_pixel_value():
    got = round_to_pixels(torch.tensor([-0.2, 0.0, 0.49 / 255, 0.51 / 255, 100.4 / 255, 1.0, 1.7]))
    assert torch.equal(got, torch.tensor([0.0, 0, 0, 1, 100, 255, 255]) / 255)
