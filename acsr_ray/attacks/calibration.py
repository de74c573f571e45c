"""Budget B0: the strength at which an attack does to the bare model what it did in the paper.

Attacks of one name differ between codes and papers; what can be compared is the damage. The radius is chosen
such that the bare model keeps the paper's share of its clean accuracy, on attacked images rounded to 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from acsr_ray.attacks.gradient import Model
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.run import BATCH, Attacked, attack_uncapped, cap, is_fooled, run_attack
from acsr_ray.attacks.spec import MINIMAL_NORM, AttackConfig
from acsr_ray.attacks.subset import subset_model

PAPER_CLEAN = 94.23
PAPER_ATTACKED = {"fgsm_08": 58.16, "fgsm_04": 65.23, "bim": 18.03, "deepfool": 17.60, "cw": 9.36}
"""Accuracies in % of the paper's undefended VGG-16 on CIFAR-10 (Table 3, "No Defense")."""

START = {"linf": 4 / 255, "l2": 0.5, "relative_l2": 0.02}
BOUNDS = {"linf": (0.5 / 255, 1.0), "l2": (1e-2, 1e3), "relative_l2": (1e-3, 2.0)}
"""Radii that are tried at most: rounding undoes smaller ones, larger ones replace the image."""
CLOSE = 1.005
"""The search ends when the bracket is narrower than this factor."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of the bare model on rounded attacked images at a radius; None: unbounded."""

    epsilon: float | None
    accuracy: float


@dataclass(frozen=True)
class Calibrated:
    """The attack at the radius that came nearest to the target.

    `accuracy` is what the bare model kept there; `reached` whether that is within the tolerance;
    `evaluations` all radii tried, in order; `note` says why a target was not reached.
    """

    config: AttackConfig
    accuracy: float
    evaluations: tuple[Evaluation, ...]
    reached: bool
    note: str


def calibrate(
    config: AttackConfig,
    model: Model,
    images: Tensor,
    labels: Tensor,
    target_accuracy: float,
    *,
    seed: int,
    keys: Tensor | None = None,
    batch_size: int | None = BATCH,
    tolerance: float = 0.005,
    max_evaluations: int = 12,
) -> Calibrated:
    """Find the radius at which the bare model's accuracy is the target, by bisection on its logarithm.

    A minimal-norm attack (cw, deepfool) runs once; its radius is a cap on the norm, so each further
    evaluation costs one pass of the model. Any other attack runs once per evaluation.

    Args:
        config: the attack; its epsilon is the first guess, an explicit step size is scaled along.
        model: images to logits, the bare target.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64.
        target_accuracy: in [0, 1], such as the clean accuracy times the paper's ratio.
        seed: see `run_attack`.
        keys: see `run_attack`.
        batch_size: see `run_attack`.
        tolerance: accuracy difference that is good enough, beside half an image.
        max_evaluations: radii tried at most.

    Raises:
        ValueError: target outside [0, 1], or no images.
    """
    if not 0 <= target_accuracy <= 1:
        raise ValueError(f"target_accuracy must be in [0, 1], got {target_accuracy}")
    if not len(images):
        raise ValueError("calibration needs images")
    enough = max(tolerance, 0.5 / len(images))
    minimal = config.name in MINIMAL_NORM
    if minimal and config.norm == "linf":
        # Only with epsilon None can the norm have been left at its default.
        config = config.model_copy(update={"norm": "relative_l2"})
    evaluate = _evaluator(config, model, images, labels, seed, keys, batch_size)
    tried: list[Evaluation] = []

    def accuracy_at(epsilon: float | None) -> float:
        tried.append(Evaluation(epsilon, evaluate(epsilon)))
        return tried[-1].accuracy

    if minimal:
        unbounded = accuracy_at(None)
        if unbounded > target_accuracy + enough:
            return _outcome(config, tried, target_accuracy, enough, "unbounded, the attack is too weak")
    clean = (
        1 - is_fooled_in_batches(model, round_to_pixels(images), labels, batch_size).double().mean().item()
    )
    if clean < target_accuracy - enough:
        accuracy_at(BOUNDS[config.norm][0])
        return _outcome(config, tried, target_accuracy, enough, "clean accuracy is below the target")
    note = _search(accuracy_at, config, target_accuracy, enough, max_evaluations)
    return _outcome(config, tried, target_accuracy, enough, note)


def is_fooled_in_batches(
    model: Model, images: Tensor, labels: Tensor, batch_size: int | None = BATCH
) -> Tensor:
    """Return which images (N,) the model misclassifies, `batch_size` at a time."""
    parts = []
    for index in torch.arange(len(images), device=images.device).split(batch_size or len(images)):
        part = model if len(index) == len(images) else subset_model(model, index)
        parts.append(is_fooled(part, images[index], labels[index]))
    return torch.cat(parts)


def _evaluator(
    config: AttackConfig,
    model: Model,
    images: Tensor,
    labels: Tensor,
    seed: int,
    keys: Tensor | None,
    batch_size: int | None,
) -> Callable[[float | None], float]:
    """Return the accuracy on rounded attacked images as a function of the radius."""
    uncapped = None
    if config.name in MINIMAL_NORM:
        uncapped = attack_uncapped(config, model, images, labels, seed=seed, keys=keys, batch_size=batch_size)

    def evaluate(epsilon: float | None) -> float:
        at = config.with_epsilon(epsilon)
        attacked: Attacked
        if uncapped is None:
            attacked = run_attack(at, model, images, labels, seed=seed, keys=keys, batch_size=batch_size)
        else:
            attacked = cap(uncapped, images, at.threat)
        fooled = is_fooled_in_batches(model, attacked.rounded, labels, batch_size)
        return 1 - fooled.double().mean().item()

    return evaluate


def _search(
    accuracy_at: Callable[[float | None], float],
    config: AttackConfig,
    target: float,
    enough: float,
    max_evaluations: int,
) -> str:
    """Bracket the target from a first guess, then bisect; return why it stopped short, or nothing."""
    least, most = BOUNDS[config.norm]
    low: float | None = None
    high: float | None = None
    guess = min(max(config.epsilon or START[config.norm], least), most)
    for _ in range(max_evaluations):
        accuracy = accuracy_at(guess)
        if abs(accuracy - target) <= enough:
            return ""
        if accuracy > target:
            low = guess
        else:
            high = guess
        if low is not None and high is not None:
            if high / low < CLOSE:
                return "accuracy jumps across the target (rounding, or few images)"
            guess = (low * high) ** 0.5
        elif high is None:
            if guess >= most:
                return "too weak at the largest radius"
            guess = min(2 * guess, most)
        else:
            if guess <= least:
                return "too strong at the smallest radius"
            guess = max(guess / 2, least)
    return f"not within {max_evaluations} evaluations"


def _outcome(
    config: AttackConfig, tried: list[Evaluation], target: float, enough: float, note: str
) -> Calibrated:
    nearest = min(tried, key=lambda evaluation: abs(evaluation.accuracy - target))
    reached = abs(nearest.accuracy - target) <= enough
    return Calibrated(
        config.with_epsilon(nearest.epsilon),
        nearest.accuracy,
        tuple(tried),
        reached,
        "" if reached else note,
    )
