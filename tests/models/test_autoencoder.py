"""MagNet's autoencoder: shape, locality and round trip."""

import pytest
import torch

from acsr_ray.artifacts import ArtifactError, begin_artifact, finish_artifact
from acsr_ray.models.autoencoder import (
    KIND,
    Autoencoder,
    AutoencoderConfig,
    load_autoencoder,
    save_autoencoder,
)


@pytest.mark.parametrize("size", [(8, 8), (5, 13)])
@pytest.mark.parametrize("hidden", [1, 3])
def test_a_pixel_reaches_as_far_as_the_convolutions(size, hidden):
    model = Autoencoder(AutoencoderConfig(width=4, hidden=hidden))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # so that no rectifier stands still, whatever the draw
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    nudged = images.clone()
    nudged[0, :, 0, 0] += 1
    difference = (model(nudged) - model(images)).abs().sum(1)
    assert difference.shape == (2, *size)
    far = torch.arange(size[0])[:, None].maximum(torch.arange(size[1])) > hidden + 1
    assert difference[0, far].max() == 0 if far.any() else True
    assert difference[0, 0, 0] > 0
    assert difference[1].max() == 0


def test_round_trip(tmp_path):
    config = AutoencoderConfig(width=5, hidden=1)
    model = Autoencoder(config)
    save_autoencoder(tmp_path, model, config, {"metrics": {}})
    loaded = load_autoencoder(tmp_path)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("content", [{}, {"autoencoder": {"width": 0}}, {"autoencoder": {"widht": 3}}])
def test_unusable_manifests(tmp_path, content):
    begin_artifact(tmp_path)
    finish_artifact(tmp_path, KIND, [], content)
    with pytest.raises(ArtifactError, match="no usable autoencoder"):
        load_autoencoder(tmp_path)


def test_weights_of_another_shape(tmp_path):
    save_autoencoder(tmp_path, Autoencoder(AutoencoderConfig(width=5)), AutoencoderConfig(width=6), {})
    with pytest.raises(ArtifactError, match="no usable autoencoder"):
        load_autoencoder(tmp_path)
