"""Classifiers as artifacts, and latents that do not depend on the batch."""

import pytest
import torch
import torch.nn.functional as F

from acsr_ray.artifacts import ArtifactError
from acsr_ray.models.classifier import (
    ENCODER_MICRO_BATCH,
    WEIGHTS,
    EncoderConfig,
    encode,
    load_classifier,
    pad_batch,
    restore_encoder,
    save_classifier,
)
from acsr_ray.models.wide_resnet import build_wide_resnet

SIDE = 16
CONFIG = EncoderConfig(architecture="wrn-10-1", num_classes=3, image_size=SIDE)
NAMES = ("cat", "dog", "owl")


def _images(num_images, side=SIDE, seed=0):
    return torch.rand(num_images, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = build_wide_resnet(CONFIG.architecture, CONFIG.num_classes)
    # Running statistics of some data, so that a lost buffer would show.
    network.train()(_images(16, seed=4))
    return network.requires_grad_(False).eval()


def test_round_trip(model, tmp_path):
    save_classifier(tmp_path, "robust", model, CONFIG, NAMES, {"metrics": {"accuracy": 0.5}})
    loaded = load_classifier(tmp_path, "robust")
    assert loaded.config == CONFIG
    assert loaded.class_names == NAMES
    assert loaded.manifest["metrics"] == {"accuracy": 0.5}
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    images = _images(4)
    assert torch.equal(loaded.model(images), model(images))


def test_wrong_kind_is_refused(model, tmp_path):
    save_classifier(tmp_path, "baseline", model, CONFIG, NAMES, {})
    with pytest.raises(ArtifactError, match="'baseline' artifact, not a 'robust'"):
        load_classifier(tmp_path, "robust")


def test_missing_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no baseline at"):
        load_classifier(tmp_path / "nothing", "baseline")


def test_changed_weights_are_refused(model, tmp_path):
    save_classifier(tmp_path, "baseline", model, CONFIG, NAMES, {})
    weights = tmp_path / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed"):
        load_classifier(tmp_path, "baseline")


@pytest.mark.parametrize("change", [{"num_classes": 4}, {"architecture": "wrn-16-1"}])
def test_weights_of_another_network_are_refused(model, change):
    with pytest.raises(ArtifactError, match="weights do not fit"):
        restore_encoder(CONFIG.model_copy(update=change), model.state_dict())


def test_stored_half_precision_is_restored_as_float32(model):
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    restored = restore_encoder(CONFIG, weights)
    assert restored.fc.weight.dtype == torch.float32
    torch.testing.assert_close(restored(_images(4)), model(_images(4)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("side", [SIDE, 21])
def test_latents_are_the_same_bits_in_any_batch(model, side):
    images = _images(33, side)
    whole = encode(model, images, SIDE)
    assert whole.shape == (33, model.latent_length)
    for size in (1, 7, 32, 33):
        parts = torch.cat([encode(model, part, SIDE) for part in images.split(size)])
        assert torch.equal(parts, whole), size
    backwards = encode(model, images.flip(0), SIDE).flip(0)
    assert torch.equal(backwards, whole)


def test_neighbours_do_not_change_a_bit(model):
    image = _images(1)
    first = encode(model, torch.cat((image, _images(6, seed=5))), SIDE)[0]
    second = encode(model, torch.cat((image, 0 * _images(40, seed=6) + 1)), SIDE)[0]
    assert torch.equal(first, second)


def test_latents_are_those_of_the_model(model):
    images = _images(5)
    torch.testing.assert_close(encode(model, images, SIDE), model.latent(images))


def test_other_sizes_are_resized_first(model):
    images = _images(3, 40)
    resized = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    torch.testing.assert_close(encode(model, images, SIDE), model.latent(resized))


def test_no_images_give_no_latents(model):
    assert encode(model, _images(0), SIDE).shape == (0, model.latent_length)


def test_padding_appends_zeros():
    images = _images(3)
    size = ENCODER_MICRO_BATCH["cpu"]
    padded = pad_batch(images, size)
    assert padded.shape == (size, 3, SIDE, SIDE)
    assert torch.equal(padded[:3], images)
    assert not padded[3:].any()
    assert pad_batch(images, 3) is images
