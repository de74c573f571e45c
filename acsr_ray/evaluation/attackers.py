"""What an attacker does with what it knows: the model that an attack is given, as wrappers of one path."""

import hashlib
from functools import partial

import torch
from torch import Tensor

from acsr_ray.attacks.adaptive import (
    Bpda,
    EndToEnd,
    Eot,
    FixedRows,
    SelectionLogits,
    attack_low_frequency,
)
from acsr_ray.attacks.run import Attacked, run_attack
from acsr_ray.attacks.subset import Model
from acsr_ray.clustering.gaussians import squared_mahalanobis
from acsr_ray.clustering.selection import Selection
from acsr_ray.defenses.base import Defense
from acsr_ray.evaluation.defenses import PurifierDefense
from acsr_ray.evaluation.grid import GridError, SweepAttack
from acsr_ray.purification.purifier import Purifier
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split

GRADIENT_FREE = ("square", "noise")


def craft(
    entry: SweepAttack,
    classify: Model,
    defense: Defense | None,
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    seed: int,
) -> tuple[Attacked, Model]:
    """Run an attack with its attacker's knowledge; return it with the model that it was meant to fool.

    Raises:
        GridError: the defence does not allow this kind of attack.
    """
    if defense is None:
        return run_attack(entry.attack, classify, images, labels, seed=seed, keys=keys), classify
    pipeline = _pipeline(entry, classify, defense, seed)
    # Judged by the defence's own random numbers, not by those that the attacker tried.
    actual: Model = partial(defense.logits, classify)
    if entry.knowledge == "selection":
        purifier = _chooser(entry, defense).purifier
        scale = float(purifier.gaussians.mean.shape[1])
        logits = SelectionLogits(lambda x: selection_distances(purifier, x), scale)
        with torch.no_grad():
            own = logits(images).argmax(1)
        return run_attack(entry.attack, logits, images, own, seed=seed, keys=keys), actual
    if entry.knowledge == "low_frequency":
        # The band that the split passes on untouched.
        attacked = attack_low_frequency(
            entry.attack, pipeline, images, labels, low_band, seed=seed, keys=keys
        )
        return attacked, actual
    model = pipeline
    if entry.knowledge == "white_box_fixed":
        model = EndToEnd(_fixed_dictionaries(_chooser(entry, defense), images), classify)
    return run_attack(entry.attack, model, images, labels, seed=seed, keys=keys), actual


def low_band(images: Tensor) -> Tensor:
    """Return the low band of images (N, 3, H, W) by the split's default settings."""
    return tikhonov_split(images, TikhonovConfig())[0]


def selection_distances(purifier: Purifier, images: Tensor) -> Tensor:
    """Return distances (N, K) whose smallest is the purifier's choice; differentiable.

    Mahalanobis distances; under `gaussian_loglik` the root of the squared ones plus log det S, which is
    raised by a constant so that it cannot be negative.
    """
    gaussians = purifier.gaussians
    squared = squared_mahalanobis(purifier.latents(images).to(torch.float64), gaussians)
    if purifier.config.selection == "gaussian_loglik":
        squared = squared + gaussians.log_det - gaussians.log_det.min()
    return squared.sqrt()


def _fixed_dictionaries(defense: PurifierDefense, images: Tensor) -> FixedRows:
    """Return the defence with the dictionaries that it gives the clean images."""
    with torch.no_grad():
        selection = defense.choose(images)

    def rebuild(x: Tensor, index: Tensor, distance: Tensor, nearest: Tensor) -> Tensor:
        return defense.purifier.reconstruct(x, Selection(index, distance, nearest)).images

    return FixedRows(rebuild, (selection.index, selection.distance, selection.candidates))


def _pipeline(entry: SweepAttack, classify: Model, defense: Defense, seed: int) -> Model:
    check_attackable(entry, defense)
    straight_through = entry.knowledge == "bpda" or not defense.differentiable

    def wrap(used: Defense) -> Model:
        # `logits`, because an ensemble is more than the one image that it returns.
        return Bpda(used, classify) if straight_through else partial(used.logits, classify)

    if not defense.randomized:
        return wrap(defense)
    # The attacker knows the defence, but not the numbers it will draw.
    return Eot(lambda draw: wrap(defense.with_seed(_foreign_seed(defense, seed, draw))), entry.eot_samples)


def _foreign_seed(defense: Defense, seed: int, draw: int) -> int:
    """Return a seed that is not the defence's own."""
    digest = hashlib.blake2b(f"{defense.seed} {seed} {draw}".encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def check_attackable(entry: SweepAttack, defense: Defense) -> None:
    """Raise `GridError` where a defence does not allow an adaptive attack."""
    if entry.knowledge in ("selection", "white_box_fixed"):
        _chooser(entry, defense)
    by_gradient = entry.attack.name not in GRADIENT_FREE
    if entry.knowledge == "bpda" and type(defense).logits is not Defense.logits:
        raise GridError(f"{entry.name}: {type(defense).__name__} classifies more than one image; use square")
    followed = entry.knowledge in ("white_box", "white_box_fixed", "transfer_purifier")
    if followed and by_gradient and not defense.differentiable:
        raise GridError(f"{entry.name}: {type(defense).__name__} has no gradient; use bpda or square")


def _chooser(entry: SweepAttack, defense: Defense) -> PurifierDefense:
    if not isinstance(defense, PurifierDefense):
        raise GridError(f"{entry.name}: {type(defense).__name__} chooses no cluster")
    return defense
