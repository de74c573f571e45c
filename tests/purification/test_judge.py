"""The classifier that doubt asks: its answers by definition, whatever the batch and the size."""

import math

import pytest
import torch
import torch.nn.functional as F

from acsr_ray.models.targets import TargetError, load_target
from acsr_ray.purification.judge import OWN_CLASSES, Judge, load_judge
from acsr_ray.purification.purifier import Purifier


@pytest.fixture(scope="module")
def purifier(tiny_bundle):
    return Purifier.load(tiny_bundle)


@pytest.fixture(scope="module")
def pairs(smooth_pixels):
    """Images of 20 pixels a side, and others in the place of the purified ones."""
    return tuple(
        torch.from_numpy(smooth_pixels(40, 20, 20, seed=seed)).permute(0, 3, 1, 2) / 255 for seed in (1, 2)
    )


def columns(opinion):
    return (opinion.label_before, opinion.label_after, opinion.log_odds, opinion.divergence)


def test_answers_are_those_of_the_definitions(tiny_target, purifier, pairs):
    opinion = load_judge(purifier, str(tiny_target)).compare(*pairs)
    model = load_target(str(tiny_target)).model
    with torch.no_grad():
        before, after = (model(images).double().softmax(1).tolist() for images in pairs)
    for row, (p, q) in enumerate(zip(before, after, strict=True)):
        assert opinion.label_before[row] == p.index(max(p))
        assert opinion.label_after[row] == q.index(max(q))
        assert opinion.log_odds[row].item() == pytest.approx(math.log(max(q) / (1 - max(q))), abs=1e-3)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert opinion.divergence[row].item() == pytest.approx(divergence, abs=1e-3)
    assert 5 < (opinion.label_before != opinion.label_after).sum() < 35


@pytest.mark.parametrize("size", [1, 7, 64])
def test_answers_do_not_depend_on_the_batch(tiny_target, purifier, pairs, size):
    judge = load_judge(purifier, str(tiny_target))
    whole = judge.compare(*pairs)
    parts = [judge.compare(*pair) for pair in zip(*(images.split(size) for images in pairs), strict=True)]
    for number, column in enumerate(columns(whole)):
        assert torch.equal(torch.cat([columns(part)[number] for part in parts]), column)


def test_a_classifier_that_is_sure_beyond_float32_still_has_odds(pairs):
    class Sure(torch.nn.Module):
        def forward(self, images):
            return images.new_tensor([90.0, 0.0, 0.0]).expand(len(images), 3)

    opinion = Judge(Sure(), 20, "sure").compare(*pairs)
    torch.testing.assert_close(opinion.log_odds, torch.full((40,), 90 - math.log(2)).double())
    assert (opinion.divergence == 0).all()


def test_the_encoder_judges_where_there_is_no_target(purifier, pairs):
    judge = load_judge(purifier, None, image_size=99)
    assert (judge.digest, judge.image_size) == (OWN_CLASSES, 16)
    small = F.interpolate(pairs[0][:1], (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(judge(pairs[0][:1]), purifier.encoder(small))


def test_a_target_sees_its_own_size_or_what_is_asked_for(tiny_target, purifier):
    assert load_judge(purifier, str(tiny_target)).image_size == 20
    assert load_judge(purifier, str(tiny_target), image_size=24).image_size == 24
    assert load_judge(purifier, str(tiny_target)).digest == load_target(str(tiny_target)).digest


def test_a_target_of_no_known_size_sees_what_the_encoder_sees(tmp_path, purifier):
    script = torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    script.save(str(tmp_path / "target.pt"))
    assert load_judge(purifier, str(tmp_path / "target.pt")).image_size == 16


def test_attacks_get_gradients(tiny_target, purifier, pairs):
    images = pairs[0][:2].clone().requires_grad_()
    load_judge(purifier, str(tiny_target), image_size=16)(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_a_missing_target_is_said(purifier):
    with pytest.raises(TargetError, match="no target"):
        load_judge(purifier, "/nowhere")
