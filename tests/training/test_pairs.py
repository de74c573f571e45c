"""Pairs for training a purifier: attacks within their budget, on the pixel grid, from their own numbers."""

import collections
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from acsr_ray.attacks.rounding import rounding_slack
from acsr_ray.training.feed import Rows, batches, needed_units
from acsr_ray.training.order import Order, lanes_of
from acsr_ray.training.pairs import ATTACKS, PairConfig, Recipe, attack_pairs, draw_pairs

ORDER = Order((12,) * 24, batch_size=24, lanes=4, window_rows=24, seed=1)
SIDE = 8


def unit_rows(unit: int) -> Rows:
    rng = np.random.default_rng(unit)
    pixels = rng.integers(0, 256, (12, SIDE, SIDE, 3)).astype(np.uint8)
    return Rows(pixels, rng.integers(0, 3, 12), np.arange(12), 0)


def follow(lanes=(0, 1, 2, 3), epochs=(0,), first=0):
    events = [e for epoch in epochs for e in ORDER.events(lanes, epoch, first if epoch == epochs[0] else 0)]
    return list(batches(ORDER, lanes, events, map(unit_rows, needed_units(events))))


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_no_draw(workers):
    config, share = PairConfig(), ORDER.lane_batch
    whole = [draw_pairs(batch, config, 3, seed=5) for batch in follow()]
    for rank in range(workers):
        lanes = lanes_of(rank, workers, 4)
        for batch, expected in zip(follow(lanes), whole, strict=True):
            drawn = draw_pairs(batch, config, 3, seed=5)
            assert drawn.recipe == expected.recipe
            for position, lane in enumerate(lanes):
                mine = slice(position * share, (position + 1) * share)
                theirs = slice(lane * share, (lane + 1) * share)
                assert torch.equal(drawn.share[mine], expected.share[theirs])
                assert torch.equal(drawn.noise[mine], expected.noise[theirs])


def test_draws_go_on_after_a_kill_and_change_with_step_and_seed():
    config = PairConfig()

    def draw(batch, seed=5):
        return draw_pairs(batch, config, 3, seed)

    whole, rest = follow(), follow(first=7)
    for batch, same in zip(rest, whole[7:], strict=True):
        assert draw(batch).recipe == draw(same).recipe
        assert torch.equal(draw(batch).share, draw(same).share)
        assert torch.equal(draw(batch).noise, draw(same).noise)
    noises = [draw(whole[0]).noise, draw(whole[1]).noise, draw(whole[0], 6).noise]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(noises, 2))
    lanes = draw(whole[0]).noise.chunk(4)
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(lanes, 2))


def test_every_kind_of_attack_is_drawn():
    config = PairConfig(linf_share=0.5, steps=5)
    recipes = [draw_pairs(b, config, 3, seed=2).recipe for b in follow(epochs=range(20))]
    assert len(recipes) == 240
    counts = collections.Counter(ATTACKS[recipe.attack] for recipe in recipes)
    assert all(35 < counts[name] < 90 for name in ATTACKS)
    assert {recipe.surrogate for recipe in recipes} == {0, 1, 2}
    for recipe in recipes:
        name = ATTACKS[recipe.attack]
        assert recipe.steps == 1 if name == "fgsm" else 2 <= recipe.steps <= 5
        assert not (name == "cw" and recipe.linf)
    assert {recipe.steps for recipe in recipes} == {1, 2, 3, 4, 5}
    other = [recipe.linf for recipe in recipes if ATTACKS[recipe.attack] != "cw"]
    assert 0.4 < np.mean(other) < 0.6


@pytest.mark.parametrize(("linf_share", "linf"), [(0.0, {False}), (1.0, {True})])
def test_one_norm_alone(linf_share, linf):
    config = PairConfig(linf_share=linf_share)
    recipes = [draw_pairs(b, config, 1, seed=2).recipe for b in follow(epochs=range(4))]
    assert {recipe.linf for recipe in recipes if ATTACKS[recipe.attack] != "cw"} == linf


def test_one_step_at_most():
    recipes = [draw_pairs(b, PairConfig(steps=1), 1, seed=2).recipe for b in follow(epochs=range(2))]
    assert {recipe.steps for recipe in recipes} == {1}


@pytest.mark.parametrize("clean", [0.0, 0.2, 1.0])
def test_shares_are_uniform_but_for_the_clean(clean):
    config = PairConfig(clean=clean)
    drawn = [draw_pairs(batch, config, 1, seed=3) for batch in follow(epochs=range(20))]
    share, noise = torch.cat([d.share for d in drawn]), torch.cat([d.noise for d in drawn])
    assert len(share) == 240 * 24
    assert (share == 0).float().mean().item() == pytest.approx(clean, abs=0.03)
    if clean < 1:
        quartiles = share[share > 0].quantile(torch.tensor([0.25, 0.5, 0.75]))
        torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.03)
        assert share.max() < 1
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_a_recipe_travels_with_every_part_of_a_batch():
    recipe = Recipe(surrogate=2, attack=3, linf=False, steps=4)
    rows = recipe.tensor(6)
    assert rows.shape == (6, 4)
    for part in rows.chunk(3):
        assert Recipe.from_tensor(part) == recipe
    linf = Recipe(surrogate=0, attack=0, linf=True, steps=1)
    assert Recipe.from_tensor(linf.tensor(1)) == linf


@pytest.mark.parametrize(
    ("name", "value"),
    [("relative_l2", -0.1), ("linf", -1), ("linf_share", 1.1), ("steps", 0), ("clean", -0.1)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValidationError, match=name):
        PairConfig(**{name: value})


def draw(images, clean=0.25, seed=0):
    """Return share and noise for images, every fourth of them clean."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(images), generator=generator)
    share[:: round(1 / clean)] = 0
    return share, torch.randn(images.shape, generator=generator)


def lengths(attacked, images, linf):
    """Return the norms (n,) of the perturbations, relative to the image where they are l2."""
    delta = (attacked - images).flatten(1)
    return delta.abs().amax(1) if linf else delta.norm(dim=1) / images.flatten(1).norm(dim=1)


def slack(images, linf):
    """Return how much longer (n,) rounding to 8 bits may make them."""
    shape = tuple(images.shape[1:])
    if linf:
        return torch.full((len(images),), rounding_slack("linf", shape))
    return rounding_slack("relative_l2", shape) / images.flatten(1).norm(dim=1)


RECIPES = [
    Recipe(0, attack, linf, 1 if name == "fgsm" else steps)
    for attack, name in enumerate(ATTACKS)
    for linf in (False, True)
    for steps in (2, 4)
    if not (linf and name == "cw") and not (name == "fgsm" and steps == 4)
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{ATTACKS[r.attack]}-{r.linf}-{r.steps}")
def test_budgets_hold_and_losses_rise(digits, recipe):
    images, labels = digits.head(64)
    config = PairConfig(relative_l2=0.08, linf=12 / 255)
    share, noise = draw(images)
    attacked = attack_pairs(digits.model, images, labels, recipe, share, noise, config)
    assert not attacked.requires_grad
    # The grid of 8 bits, within [0, 1].
    levels = attacked * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    # Each image's own budget, most of which is used.
    radius = share * (config.linf if recipe.linf else config.relative_l2)
    found = lengths(attacked, images, recipe.linf)
    assert (found <= radius + slack(images, recipe.linf) + 1e-6).all()
    assert (found[share > 0.2] > 0.6 * radius[share > 0.2]).all()
    clean = share == 0
    assert clean.sum() == 16
    assert torch.equal(attacked[clean], images[clean])

    def loss(shown):
        return F.cross_entropy(digits.model(shown), labels, reduction="none")

    large = share > 0.3
    rise = (loss(attacked) - loss(images))[large]
    assert rise.mean() > 0.1
    assert (rise > 0).float().mean() > 0.9


def test_one_step_goes_along_the_sign_of_the_gradient(digits):
    images, labels = digits.head(16)
    config, share = PairConfig(relative_l2=0.03), torch.ones(16)
    noise = draw(images)[1]
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(digits.model(leaf), labels, reduction="sum"), leaf)
    sign = gradient.sign()
    size = (0.03 * images.flatten(1).norm(dim=1) / sign.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    expected = ((images + size * sign) * 255).round().clamp(0, 255) / 255
    fgsm = Recipe(0, ATTACKS.index("fgsm"), False, 1)
    attacked = attack_pairs(digits.model, images, labels, fgsm, share, noise, config)
    # A step that ends half way between two levels may be rounded either way.
    assert (attacked - expected).abs().max() < 1.5 / 255
    assert (attacked == expected).float().mean() > 0.999


@pytest.mark.parametrize(("name", "even"), [("fgsm", True), ("bim", True), ("pgd", False), ("cw", False)])
def test_l2_attacks_with_and_without_the_sign(digits, name, even):
    """Along the sign, all pixels go equally far; along the gradient, few go far."""
    images, labels = digits.head(16)
    recipe = Recipe(0, ATTACKS.index(name), False, 1)
    config = PairConfig(relative_l2=0.08)
    noise = torch.zeros_like(images)
    attacked = attack_pairs(digits.model, images, labels, recipe, torch.ones(16), noise, config)
    moved = (attacked - images).abs().flatten(1)
    peak = moved.amax(1) / moved.square().mean(1).sqrt()
    assert (peak < 1.5).all() == even
    assert (peak > 2).all() != even


def test_more_steps_fool_more(digits):
    images, labels = digits.head(100)
    config, noise = PairConfig(relative_l2=0.1), draw(images)[1]

    def wrong(steps):
        recipe = Recipe(0, ATTACKS.index("pgd"), False, steps)
        attacked = attack_pairs(digits.model, images, labels, recipe, torch.ones(100), noise, config)
        return F.cross_entropy(digits.model(attacked), labels).item()

    assert wrong(10) > 1.01 * wrong(1)


def test_pgd_starts_from_its_noise_and_bim_from_the_image(digits):
    images, labels = digits.head(16)
    config, share = PairConfig(), torch.ones(16)
    noises = [draw(images, seed=seed)[1] for seed in (0, 1)]
    for name, depends in (("pgd", True), ("bim", False), ("fgsm", False), ("cw", False)):
        recipe = Recipe(0, ATTACKS.index(name), False, 2)
        one, two = (
            attack_pairs(digits.model, images, labels, recipe, share, noise, config) for noise in noises
        )
        assert torch.equal(one, two) != depends, name


@pytest.mark.parametrize("linf", [False, True])
def test_an_image_is_attacked_alone(digits, linf):
    images, labels = digits.head(12)
    share, noise = draw(images)
    recipe, config = Recipe(0, ATTACKS.index("pgd"), linf, 3), PairConfig()
    whole = attack_pairs(digits.model, images, labels, recipe, share, noise, config)
    parts = zip(images.split(5), labels.split(5), share.split(5), noise.split(5), strict=True)
    joined = torch.cat([attack_pairs(digits.model, *part[:2], recipe, *part[2:], config) for part in parts])
    # Another batch may round a gradient otherwise, by a grey level here and there.
    assert (joined - whole).abs().max() < 1.5 / 255
    assert (joined == whole).float().mean() > 0.99


@pytest.mark.parametrize("linf", [False, True])
def test_the_gaussian_control_has_the_norms_and_no_surrogate(digits, linf):
    images, labels = digits.head(64)
    share, noise = draw(images)
    config = PairConfig(kind="gaussian", relative_l2=0.08, linf=12 / 255)
    # There is nothing to call, so nothing was.
    attacked = attack_pairs(None, images, labels, Recipe(0, 3, linf, 4), share, noise, config)
    if linf:
        # As long as a sign attack of the radius, where nothing is clipped.
        mid = 0.25 + images / 2
        grey = attack_pairs(None, mid, labels, Recipe(0, 3, linf, 4), share, noise, config)
        moved = (grey - mid).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(moved, share * config.linf, rtol=0.1, atol=1 / 255)
    else:
        radius = share * config.relative_l2
        found = lengths(attacked, images, linf)
        assert (found <= radius + slack(images, linf) + 1e-6).all()
        assert (found >= radius - slack(images, linf) - 1e-6).all()
    assert torch.equal(attacked[share == 0], images[share == 0])
    levels = attacked * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    # It goes where the noise points, which the surrogate minds less than an attack.
    delta = (attacked - images)[share > 0.5]
    assert F.cosine_similarity(delta.flatten(1), noise[share > 0.5].flatten(1)).min() > 0.6
    adversarial = attack_pairs(
        digits.model,
        images,
        labels,
        Recipe(0, 2, linf, 4),
        share,
        noise,
        PairConfig(relative_l2=0.08, linf=12 / 255),
    )
    losses = [F.cross_entropy(digits.model(shown), labels) for shown in (images, attacked, adversarial)]
    assert losses[2] - losses[0] > 3 * (losses[1] - losses[0]).abs()


def test_no_budget_is_no_attack(digits):
    images, labels = digits.head(8)
    config = PairConfig(relative_l2=0, linf=0)
    noise = draw(images)[1]
    for recipe in RECIPES:
        attacked = attack_pairs(digits.model, images, labels, recipe, torch.ones(8), noise, config)
        assert torch.equal(attacked, images)
