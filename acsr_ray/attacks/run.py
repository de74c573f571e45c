"""Run one attack of a sweep on a model: the one entry point, whatever the attack is.

An attacked image counts as it is stored, so the result is rounded to 8 bits, and where rounding undid a
minimal-norm attack it is tried again stronger. Budgets are met by the float images; rounding may add up to
`rounding_slack` to the norm of the rounded ones, so report their own norms.

The result for an image does not depend on its neighbours, up to the last bits in which a model's own matrix
products differ between batch sizes: stopping, step sizes and random numbers are per image. Random numbers
come from the seed and the image's key, so a data set gives the same result in any chunks when `keys` are its
row numbers. Exceptions: models that draw numbers themselves, and torchattacks, which draws and (CW) stops for
the batch as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from acsr_ray.attacks.apgd import apgd
from acsr_ray.attacks.carlini_wagner import carlini_wagner
from acsr_ray.attacks.deepfool import deepfool
from acsr_ray.attacks.draws import Draws
from acsr_ray.attacks.gradient import Model, bim, fgsm, noise, pgd_attack, tpgd
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.spec import MINIMAL_NORM, AttackConfig
from acsr_ray.attacks.square import square
from acsr_ray.attacks.subset import subset_model
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.attacks.torchattacks_adapter import call_torchattacks

BATCH = 128
CAP_TOLERANCE = 1e-4
"""Relative excess over the budget that float arithmetic may cause; more is scaled back and reported."""


@dataclass(frozen=True)
class Attacked:
    """Attacked images (N, 3, H, W) in [0, 1].

    `rounded` is on the 8-bit grid, after the ladder of strengths; `unrounded` the float result of the first
    strength. `scaled_back` (N,) says which float results lay outside the declared budget and were brought
    back to it: ordinary for cw and deepfool under a cap, worth a look for torchattacks.
    """

    rounded: Tensor
    unrounded: Tensor
    scaled_back: Tensor


@dataclass(frozen=True)
class Uncapped:
    """Float results (N, 3, H, W) before any budget: of the first strength, and of the last one tried."""

    first: Tensor
    final: Tensor


def run_attack(
    config: AttackConfig,
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    keys: Tensor | None = None,
    batch_size: int | None = BATCH,
) -> Attacked:
    """Attack images.

    Args:
        config: the attack.
        model: images in [0, 1] to logits (N, J), in evaluation mode, on the images' device. May have
            `rows(index)` when it holds state per image (`subset_model`).
        images: (N, 3, H, W) float in [0, 1]. Not under `torch.inference_mode`.
        labels: (N,) int64 true labels.
        seed: of all random numbers.
        keys: (N,) int64 names of the images for their random numbers; their positions when omitted.
        batch_size: images attacked together; None: all.

    Raises:
        ValueError: images or labels are not what they must be.
        ConfigError: torchattacks has no such attack or option.
        MissingExtraError: torchattacks is not installed.
    """
    batches = _batches(model, images, labels, seed, keys, batch_size)
    parts = [_attack_batch(config, *batch) for batch in batches]
    return _joined(parts) if parts else Attacked(images, images, labels.bool())


def attack_uncapped(
    config: AttackConfig,
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    keys: Tensor | None = None,
    batch_size: int | None = BATCH,
) -> Uncapped:
    """Run a minimal-norm or torchattacks attack with its ladder, ignoring `epsilon`; see `run_attack`."""
    batches = _batches(model, images, labels, seed, keys, batch_size)
    parts = [_climb(config, *batch) for batch in batches]
    if not parts:
        return Uncapped(images, images)
    return Uncapped(torch.cat([part.first for part in parts]), torch.cat([part.final for part in parts]))


def cap(uncapped: Uncapped, images: Tensor, threat: ThreatModel | None) -> Attacked:
    """Scale results outside the budget back to it, and round."""
    first, first_over = _scale_back(uncapped.first, images, threat)
    final, final_over = _scale_back(uncapped.final, images, threat)
    return Attacked(round_to_pixels(final), first, first_over | final_over)


def is_fooled(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Return which images (N,) the model misclassifies."""
    with torch.no_grad():
        return model(images).argmax(1) != labels


def check_inputs(images: Tensor, labels: Tensor) -> None:
    """Raise `ValueError` unless images are (N, 3, H, W) floats in [0, 1] with labels (N,) int64."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point() or not torch.isfinite(images).all():
        raise ValueError(f"images must be finite floats, got {images.dtype}")
    if len(images) and (images.min() < 0 or images.max() > 1):
        raise ValueError(f"images must be in [0, 1], got [{images.min():.4g}, {images.max():.4g}]")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({len(images)},) int64, got {tuple(labels.shape)} {labels.dtype}")


def _keys(images: Tensor, keys: Tensor | None) -> Tensor:
    if keys is None:
        return torch.arange(len(images), device=images.device)
    if keys.shape != images.shape[:1]:
        raise ValueError(f"keys must be ({len(images)},), got {tuple(keys.shape)}")
    return keys.to(images.device)


def _batches(
    model: Model, images: Tensor, labels: Tensor, seed: int, keys: Tensor | None, batch_size: int | None
) -> Iterator[tuple[Model, Tensor, Tensor, Draws]]:
    """Yield model, images, labels and draws of each batch, after a check of them all."""
    check_inputs(images, labels)
    draws = Draws(seed, _keys(images, keys))
    positions = torch.arange(len(images), device=images.device)
    for index in positions.split(batch_size or max(len(images), 1)) if len(images) else ():
        part = model if len(index) == len(images) else subset_model(model, index)
        yield part, images[index], labels[index], draws.rows(index)


def _joined(parts: list[Attacked]) -> Attacked:
    return Attacked(
        torch.cat([part.rounded for part in parts]),
        torch.cat([part.unrounded for part in parts]),
        torch.cat([part.scaled_back for part in parts]),
    )


def _attack_batch(
    config: AttackConfig, model: Model, images: Tensor, labels: Tensor, draws: Draws
) -> Attacked:
    if config.is_torchattacks or config.name in MINIMAL_NORM:
        return cap(_climb(config, model, images, labels, draws), images, config.threat)
    found = _within_ball(config, model, images, labels, draws)
    for restart in range(1, config.restarts):
        standing = (~is_fooled(model, round_to_pixels(found), labels)).nonzero()[:, 0]
        if not len(standing):
            break
        rest, again = subset_model(model, standing), draws.rows(standing).fork(restart)
        points = _within_ball(config, rest, images[standing], labels[standing], again)
        fell = is_fooled(rest, round_to_pixels(points), labels[standing])
        found[standing[fell]] = points[fell]
    return Attacked(round_to_pixels(found), found, torch.zeros_like(labels, dtype=torch.bool))


def _within_ball(config: AttackConfig, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
    """Run one attack with a budget once, and return float images."""
    threat = config.threat
    assert threat is not None  # the configuration's own check
    steps, step_size = config.num_steps, config.step
    random_start = config.random_start is not False
    match config.name:
        case "noise":
            return noise(images, threat=threat, draws=draws)
        case "fgsm":
            return fgsm(model, images, labels, threat=threat)
        case "bim":
            return bim(model, images, labels, threat=threat, steps=steps, step_size=step_size)
        case "pgd":
            start = draws if random_start else None
            return pgd_attack(
                model, images, labels, threat=threat, steps=steps, step_size=step_size, draws=start
            )
        case "tpgd":
            return tpgd(model, images, threat=threat, steps=steps, step_size=step_size, draws=draws)
        case "apgd":
            point = threat.drawn_start(images, draws) if random_start else images
            return apgd(model, images, labels, threat=threat, steps=steps, loss=config.loss, start=point)
        case _:
            return square(model, images, labels, threat=threat, queries=config.queries, draws=draws)


def _climb(config: AttackConfig, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Uncapped:
    """Run an attack at rising strengths on the images that rounding brought back."""
    first = _unbounded(config, {}, model, images, labels, draws.seed)
    # A minimal-norm attack that failed as floats does not succeed at a higher margin; others may.
    hopeful = torch.ones_like(labels, dtype=torch.bool)
    if config.name in MINIMAL_NORM and config.ladder:
        hopeful = is_fooled(model, first, labels)
    final = first.clone()
    for strength in config.ladder:
        standing = (hopeful & ~is_fooled(model, round_to_pixels(final), labels)).nonzero()[:, 0]
        if not len(standing):
            break
        if config.name == "deepfool":
            # Along the line that was found: only the overshoot changes.
            factor = (1 + strength["overshoot"]) / (1 + config.overshoot)
            longer = images[standing] + factor * (first[standing] - images[standing])
            final[standing] = longer.clamp(0, 1)
            continue
        rest = subset_model(model, standing)
        final[standing] = _unbounded(config, strength, rest, images[standing], labels[standing], draws.seed)
    return Uncapped(first, final)


def _unbounded(
    config: AttackConfig, strength: dict[str, float], model: Model, images: Tensor, labels: Tensor, seed: int
) -> Tensor:
    if config.is_torchattacks:
        return call_torchattacks(config, strength, model, images, labels, seed)
    if config.name == "deepfool":
        return deepfool(
            model,
            images,
            labels,
            steps=config.num_steps,
            overshoot=config.overshoot,
            classes=config.classes,
        )
    return carlini_wagner(
        model,
        images,
        labels,
        c=config.c,
        kappa=strength.get("kappa", config.kappa),
        steps=config.num_steps,
        lr=config.lr,
        binary_search_steps=config.binary_search_steps,
    )


def _scale_back(points: Tensor, images: Tensor, threat: ThreatModel | None) -> tuple[Tensor, Tensor]:
    if threat is None:
        return points, torch.zeros(len(points), dtype=torch.bool, device=points.device)
    limit = threat.radius(images) * (1 + CAP_TOLERANCE) + 1e-6
    over = threat.length(points - images) > limit
    return torch.where(over, threat.project(points, images), points), over.flatten()
