"""MagNet is its autoencoder, clipped; PixelDefend stays in its ball and raises the likelihood."""

import pytest
import torch

from acsr_ray.evaluation.learned_defenses import MICRO_BATCH, Magnet, PixelDefend
from acsr_ray.models.autoencoder import Autoencoder, AutoencoderConfig
from acsr_ray.models.pixel_cnn import PixelCnn, PixelCnnConfig, log_likelihood


@pytest.fixture(scope="module")
def images(smooth_pixels):
    return torch.from_numpy(smooth_pixels(MICRO_BATCH + 3, 10, 12, 0)).permute(0, 3, 1, 2).contiguous() / 255


@pytest.fixture(scope="module")
def pixel_cnn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PixelCnn(PixelCnnConfig(radius=2, width=12, mixtures=2)).requires_grad_(False)


def test_magnet_is_the_clipped_autoencoder(images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(AutoencoderConfig(width=6)).requires_grad_(False)
    model.layers[-1].bias += 0.6
    defended = Magnet(model)(images)
    assert torch.allclose(defended, model(images).clamp(0, 1), atol=1e-6)
    assert torch.equal(defended[MICRO_BATCH:], Magnet(model)(images[MICRO_BATCH:]))


@pytest.mark.parametrize("epsilon", [0.0, 1 / 255, 16 / 255, 0.03])
def test_pixel_defend_stays_in_the_ball(pixel_cnn, images, epsilon):
    defended = PixelDefend(pixel_cnn, epsilon)(images)
    assert (defended - images).abs().max() <= epsilon + 1e-6
    assert torch.equal(defended, images) == (epsilon == 0)


def test_whole_levels_are_not_lost_to_rounding(pixel_cnn):
    assert [PixelDefend(pixel_cnn, level / 255).reach for level in range(256)] == list(range(256))
    with pytest.raises(ValueError, match="epsilon"):
        PixelDefend(pixel_cnn, -0.1)


def test_pixel_defend_raises_the_likelihood(pixel_cnn, images):
    def likelihood(batch):
        levels = batch * 255
        grid = torch.meshgrid(*(torch.arange(n) for n in (len(batch), 10, 12)), indexing="ij")
        image, row, column = (index.flatten() for index in grid)
        parameters = pixel_cnn(pixel_cnn.neighbourhoods(pixel_cnn.pad(levels), image, row, column))
        return log_likelihood(parameters, levels[image, :, row, column]).view(len(batch), -1).sum(1)

    assert (likelihood(PixelDefend(pixel_cnn)(images)) > likelihood(images)).all()
