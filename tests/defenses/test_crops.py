"""The crop ensemble: averages of probabilities over crops that are the image's own."""

import pytest
import torch
import torch.nn.functional as F

from acsr_ray.defenses.crops import CropEnsemble


@pytest.fixture
def images(smooth_pixels):
    return torch.from_numpy(smooth_pixels(3, 12, 16, 0)).permute(0, 3, 1, 2).contiguous() / 255


def classify(images):
    """A classifier to which positions matter."""
    weight = torch.randn(4, images[0].numel(), generator=torch.Generator().manual_seed(0)).to(images)
    return images.flatten(1) @ weight.T


def test_whole_crops_change_nothing(images):
    defense = CropEnsemble(5, 1.0)
    assert torch.equal(defense(images), images)
    assert torch.allclose(defense.logits(classify, images).softmax(1), classify(images).softmax(1), atol=1e-5)


def test_forward_is_the_central_crop_rescaled(images):
    expected = F.interpolate(images[..., 3:9, 4:12], (12, 16), mode="bilinear", align_corners=False)
    assert torch.allclose(CropEnsemble(5, 0.5)(images), expected)


def test_logits_are_the_log_of_averaged_probabilities(images):
    seen = []

    def watched(x):
        seen.append(classify(x))
        return seen[-1]

    logits = CropEnsemble(7, 0.6).logits(watched, images)
    average = torch.stack([part.softmax(1) for part in seen]).mean(0)
    assert len(seen) == 7
    assert torch.allclose(logits.exp(), average, atol=1e-6)
    assert not all(torch.equal(seen[0], part) for part in seen)


def test_crops_depend_on_image_and_seed_alone(images):
    defense = CropEnsemble(4, 0.5)
    whole = defense.logits(classify, images)
    assert torch.allclose(whole[1:2], defense.logits(classify, images[1:2]), atol=1e-4)
    assert not torch.allclose(whole, defense.with_seed(1).logits(classify, images), atol=1e-2)


def test_gradient_of_the_ensemble_by_finite_differences(images):
    # One set of crops for all evaluations: nudges far below half a level keep the 8-bit image.
    x = (images[:1, :, :5, :6].double() * 0.8 + 0.11).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: CropEnsemble(3, 0.6).logits(classify, y), x, eps=1e-6)


@pytest.mark.parametrize("bad", [(0, 0.5), (3, 0.0), (3, 1.1)])
def test_values_out_of_range(bad):
    with pytest.raises(ValueError, match="crop"):
        CropEnsemble(*bad)
