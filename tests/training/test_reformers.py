"""Training of the reformers: they learn what they are for, and a seed fixes the result."""

import math

import numpy as np
import pytest
import torch

from acsr_ray.models.autoencoder import AutoencoderConfig
from acsr_ray.models.pixel_cnn import PixelCnnConfig
from acsr_ray.training.reformers import MagnetTraining, PixelCnnTraining, train_autoencoder, train_pixel_cnn

MAGNET = MagnetTraining(
    network=AutoencoderConfig(width=8, hidden=1), noise=0.15, steps=250, batch_size=8, peak_lr=0.01
)
PIXELS = PixelCnnTraining(
    network=PixelCnnConfig(radius=2, width=24, blocks=1, mixtures=2), steps=120, images=8
)


@pytest.fixture(scope="module")
def pixels(smooth_pixels):
    return smooth_pixels(60, 16, 16, 0)


def test_autoencoder_denoises(pixels):
    _, metrics = train_autoencoder(pixels, MAGNET, device="cpu", seed=0)
    noisy_input = -20 * math.log10(MAGNET.noise)
    assert metrics["noisy_psnr_db"] > noisy_input + 2
    assert metrics["clean_psnr_db"] > metrics["noisy_psnr_db"]


def test_pixel_cnn_beats_eight_bits(pixels):
    model, metrics = train_pixel_cnn(pixels, PIXELS, device="cpu", seed=0)
    assert metrics["bits_per_value"] < 7.3
    assert not model.training


@pytest.mark.parametrize(("train", "training"), [(train_autoencoder, MAGNET), (train_pixel_cnn, PIXELS)])
def test_the_seed_decides(train, training, pixels):
    short = training.model_copy(update={"steps": 3})
    first, again, other = (
        torch.cat([p.flatten() for p in train(pixels, short, device="cpu", seed=seed)[0].parameters()])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_single_image_is_enough():
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    train_autoencoder(pixels, MAGNET.model_copy(update={"steps": 1}), device="cpu", seed=0)
    train_pixel_cnn(pixels, PIXELS.model_copy(update={"steps": 1}), device="cpu", seed=0)
