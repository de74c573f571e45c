"""What is packaged works on photos, in both of its ways where it has two, and stays small."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

from acsr_ray.purification.bundle import ALIASES, find_bundle, load_bundle
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier

NAMES = sorted(set(ALIASES.values()))
BYTES = 16_000_000


@pytest.fixture(scope="module")
def photos():
    """Return small versions (2, 3, 48, 64) of two photos, as 8-bit pixels in [0, 1]."""
    whole = [torch.tensor(load_sample_image(name)).permute(2, 0, 1) for name in ("china.jpg", "flower.jpg")]
    small = F.interpolate(torch.stack(whole).float() / 255, size=(48, 64), mode="area")
    return (255 * small).round() / 255


def ways(name):
    """Return the reconstructions that a bundle has."""
    return ["cbpdn", *(["unrolled"] if load_bundle(name).config.unrolled else [])]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small(name):
    assert sum(path.stat().st_size for path in find_bundle(name).iterdir()) <= BYTES


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in NAMES for way in ways(name)])
def test_photos_stay_recognisable(name, way, photos):
    with torch.no_grad():
        purified = Purifier.load(name, options=PurifyOptions(reconstruction=way)).purify(photos)
    assert purified.solved.all()
    assert purified.images.min() >= 0
    assert purified.images.max() <= 1
    assert 0 < (purified.images - photos).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_sparse_coding_takes_noise_from_photos(name, photos):
    noise = torch.randn(photos.shape, generator=torch.Generator().manual_seed(0))
    noisy = (photos + 0.15 * noise).clamp(0, 1)
    with torch.no_grad():
        purified = Purifier.load(name, options=PurifyOptions(reconstruction="cbpdn"))(noisy)
    before, after = ((images - photos).square().mean() for images in (noisy, purified))
    assert after < 0.5 * before


@pytest.mark.parametrize("name", NAMES)
def test_the_default_is_the_trained_reconstruction(name, photos):
    with torch.no_grad():
        default = Purifier.load(name)(photos)
        asked = Purifier.load(name, options=PurifyOptions(reconstruction="unrolled"))(photos)
    assert torch.equal(default, asked)
