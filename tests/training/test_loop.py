"""The training loop and its augmentation on tiny data."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acsr_ray.models.wide_resnet import build_wide_resnet
from acsr_ray.training.loop import (
    EVALUATION_BATCH,
    OptimizerConfig,
    accuracy,
    augment,
    fit,
    predict,
    resolve_device,
)

SIDE = 8
CONFIG = OptimizerConfig(epochs=6, batch_size=16, peak_lr=0.05, crop_padding=1, flip=True)


def _data(num_images=96, seed=0):
    """Return noisy images, red for class 0, green for class 1 and blue for class 2."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 3
    pixels = rng.integers(0, 120, (num_images, SIDE, SIDE, 3))
    pixels[np.arange(num_images), :, :, labels] += 100
    return pixels.astype(np.uint8), labels


def _network(seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_wide_resnet("wrn-10-1", 3)


def _fit(model, config=CONFIG, seed=0, data=None, objective=None):
    stats = []
    fit(
        model,
        *(data or _data()),
        objective or (lambda images, labels, _: F.cross_entropy(model(images), labels)),
        config,
        device="cpu",
        seed=seed,
        on_epoch=stats.append,
    )
    return stats


def test_separable_classes_are_learned():
    model = _network()
    stats = _fit(model)
    assert [stat.epoch for stat in stats] == list(range(1, CONFIG.epochs + 1))
    assert stats[-1].loss < 0.3 * stats[0].loss
    assert not model.training
    pixels, labels = _data(seed=2)
    assert accuracy(predict(model, pixels), labels) > 0.95


def test_seed_decides_everything():
    config = CONFIG.model_copy(update={"epochs": 2})
    state = torch.get_rng_state()
    models = [_network() for _ in range(3)]
    stats = [_fit(model, config, seed) for model, seed in zip(models, (5, 5, 6), strict=True)]
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert [stat.loss for stat in stats[0]] == [stat.loss for stat in stats[1]]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_shows_each_image_at_most_once_with_its_label_and_index():
    pixels, labels = _data(70)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3))
    seen = []

    def objective(images, targets, chosen):
        assert model.training
        expected = torch.from_numpy(pixels[chosen.numpy()]).permute(0, 3, 1, 2).float() / 255
        torch.testing.assert_close(images, expected)
        assert targets.tolist() == labels[chosen.numpy()].tolist()
        seen.append(chosen.tolist())
        return F.cross_entropy(model(images), targets)

    config = OptimizerConfig(epochs=2, batch_size=16, peak_lr=0.01, crop_padding=0, flip=False)
    _fit(model, config, data=(pixels, labels), objective=objective)
    assert [len(batch) for batch in seen] == [16] * 8
    epochs = [[i for batch in half for i in batch] for half in (seen[:4], seen[4:])]
    assert all(len(set(epoch)) == 64 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_fewer_images_than_a_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3))
    before = model[1].weight.detach().clone()
    stats = _fit(model, CONFIG.model_copy(update={"epochs": 3}), data=_data(5))
    assert len(stats) == 3
    assert all(np.isfinite(stat.loss) for stat in stats)
    assert not torch.equal(model[1].weight, before)


def _images(num_images=6, side=10, seed=3):
    return torch.rand(num_images, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_augmentation_switched_off_is_the_identity():
    images = _images()
    config = OptimizerConfig(crop_padding=0, flip=False)
    assert torch.equal(augment(images, config, torch.Generator().manual_seed(0)), images)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_shifts_and_mirror_images(padding, flip):
    images = _images(40)
    config = OptimizerConfig(crop_padding=padding, flip=flip)
    augmented = augment(images, config, torch.Generator().manual_seed(1))
    assert augmented.shape == images.shape
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (10, 10), axis=(2, 3))
    used = set()
    for n in range(40):
        for mirrored in (False, True):
            target = augmented[n].numpy()[:, :, ::-1] if mirrored else augmented[n].numpy()
            same = (windows[n] == target[:, None, None]).all((0, 3, 4))
            used.update((mirrored, *where) for where in np.argwhere(same).tolist())
    rows, columns = {row for _, row, _ in used}, {column for _, _, column in used}
    assert {mirrored for mirrored, _, _ in used} == ({False, True} if flip else {False})
    assert rows == columns == set(range(2 * padding + 1))
    assert len(used) > (1 if padding or flip else 0)


def test_augmentation_follows_its_generator():
    images = _images()
    first, again, other = (
        augment(images, OptimizerConfig(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_prediction_joins_its_batches():
    pixels, _ = _data(EVALUATION_BATCH + 5)
    weight = torch.randn(3 * SIDE * SIDE, 3, generator=torch.Generator().manual_seed(4))
    logits = predict(lambda images: images.flatten(1) @ weight, pixels)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1).float() / 255 @ weight
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_accuracy_is_the_share_of_right_answers():
    logits = torch.tensor([[2.0, 1], [0, 3], [5, 4], [1, 2]])
    assert accuracy(logits, np.array([0, 1, 1, 1])) == 0.75


def test_device_is_resolved():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
