"""Attacks of torchattacks under our contract."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acsr_ray.attacks.torchattacks_adapter import AttackSpec, round_to_pixels, run_attack

torchattacks = pytest.importorskip("torchattacks")

SIDE = 6
PGD = AttackSpec("PGD", {"eps": 8 / 255, "alpha": 2 / 255, "steps": 4, "random_start": True})


@pytest.fixture(scope="module")
def data():
    images = torch.rand(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return images, (images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))).long()


@pytest.fixture(scope="module")
def model(data):
    images, labels = data
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    assert (network(images).argmax(1) == labels).all()
    return network.eval()


def _on_grid(images):
    scaled = images * 255
    return (scaled - scaled.round()).abs().max() < 1e-4


def test_result_is_on_the_8_bit_grid_within_rounding_of_the_ball(model, data):
    images, labels = data
    result = run_attack(PGD, model, images, labels)
    assert result.rounded.shape == result.unrounded.shape == images.shape
    assert _on_grid(result.rounded)
    assert not _on_grid(result.unrounded)
    assert torch.equal(result.rounded, round_to_pixels(result.unrounded))
    assert (result.unrounded - images).abs().max() <= 8 / 255 + 1e-6
    assert 0 <= result.rounded.min() <= result.rounded.max() <= 1
    before, after = (F.cross_entropy(model(x), labels) for x in (images, result.rounded))
    assert after > before


def test_global_random_state_is_untouched(model, data):
    state = torch.get_rng_state()
    run_attack(PGD, model, *data, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_decides_the_random_start(model, data):
    torch.manual_seed(100)
    first = run_attack(PGD, model, *data, seed=5).unrounded
    torch.manual_seed(200)
    again = run_attack(PGD, model, *data, seed=5).unrounded
    other = run_attack(PGD, model, *data, seed=6).unrounded
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_options_reach_the_attack(model, data):
    images, labels = data
    got = run_attack(AttackSpec("FGSM", {"eps": 0.03}), model, images, labels).unrounded
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)
    torch.testing.assert_close(got, (images + 0.03 * gradient.sign()).clamp(0, 1))


def test_strength_rises_only_for_images_that_still_stand(model, data):
    images, labels = data
    strengths = [{"eps": 0.055}, {"eps": 0.06}, {"eps": 0.065}]
    expected, rungs = None, []
    for strength in strengths:
        attacked = run_attack(AttackSpec("FGSM", strength), model, images, labels).rounded
        standing = torch.ones(len(images), dtype=torch.bool)
        if expected is None:
            expected = attacked.clone()
        else:
            standing = model(expected).argmax(1) == labels
            expected[standing] = attacked[standing]
        rungs.append(int(standing.sum()))
    # Each strength must fell some of the images and leave others, or this test shows nothing.
    assert rungs[0] > rungs[1] > rungs[2] > 0

    result = run_attack(AttackSpec("FGSM", {}, strengths), model, images, labels)
    torch.testing.assert_close(result.rounded, expected, rtol=0, atol=1e-6)
    first = run_attack(AttackSpec("FGSM", strengths[0]), model, images, labels)
    torch.testing.assert_close(result.unrounded, first.unrounded, rtol=0, atol=1e-6)


def test_images_that_fell_are_not_attacked_again(model, data):
    images, labels = data
    wrong = 1 - labels
    gentle = AttackSpec("FGSM", {"eps": 0.01})
    ladder = AttackSpec("FGSM", {}, [{"eps": 0.01}, {"eps": 0.3}])
    # Under the wrong labels every image counts as fallen from the start.
    expected = run_attack(gentle, model, images, wrong).rounded
    fallen = model(expected).argmax(1) != wrong
    assert fallen.any()
    got = run_attack(ladder, model, images, wrong).rounded
    assert torch.equal(got[fallen], expected[fallen])


def test_model_stays_in_evaluation_mode(model, data):
    run_attack(PGD, model, *data)
    assert not model.training


def test_unknown_attack_is_refused(model, data):
    with pytest.raises(ValueError, match="no attack 'NoSuchAttack'"):
        run_attack(AttackSpec("NoSuchAttack", {}), model, *data)


def test_rounding_is_to_the_nearest_pixel_value():
    got = round_to_pixels(torch.tensor([-0.2, 0.0, 0.49 / 255, 0.51 / 255, 100.4 / 255, 1.0, 1.7]))
    expected = torch.tensor([0.0, 0, 0, 1, 100, 255, 255]) / 255
    assert torch.equal(got, expected)
