"""Checks that tell whether an evaluation can be believed, on summary numbers.

An attack that fails for a technical reason looks like a defence that works. The signs of it were collected by
Athalye, Carlini and Wagner 2018 ("Obfuscated gradients give a false sense of security", section 3.1), by
Carlini et al. 2019 ("On evaluating adversarial robustness", the checklist) and by Croce and Hein 2020
("Reliable evaluation of adversarial robustness"). Each function returns warnings, none when all is well;
accuracies are `Share`s, and a difference counts when it is beyond the 95 % intervals of both.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from acsr_ray.evaluation.intervals import Share


@dataclass(frozen=True)
class SanityWarning:
    """One sign that a number is not what it seems."""

    name: str
    """Of the check: `noise`, `budget`, `huge_budget`, `black_box`, `one_step` or `purified_clean`."""
    message: str


def check_noise(cell: str, clean: Share, noise: Share, tolerance: float = 0.01) -> list[SanityWarning]:
    """Warn when random noise of the attack's norm does harm by itself.

    Then a budget is so large that accuracy falls without an adversary, and a defence is credited with
    denoising. Source: the random perturbations of Carlini et al. 2019.

    Args:
        cell: names target and defence in the message.
        clean: accuracy without a perturbation.
        noise: accuracy under noise of the attack's norm, on the same images.
        tolerance: drop that is harmless in any case.
    """
    if _exceeds(clean, noise, tolerance):
        return [SanityWarning("noise", f"{cell}: noise of equal norm takes {clean} to {noise} %")]
    return []


def check_budgets(
    cell: str, points: Sequence[tuple[float, Share]], *, huge: float, allowed: float = 0.01
) -> list[SanityWarning]:
    """Warn when an iterative white-box attack does not get stronger with its budget, or never wins.

    An unbounded attack can turn any image into one of another class; if it does not, its gradients are of no
    use. Source: Athalye et al. 2018 ("unbounded attacks do not reach 100 % success", "increasing distortion
    bound does not increase success"); Carlini et al. 2019.

    Args:
        cell: names target, defence and attack in the messages.
        points: (budget, accuracy) in any order.
        huge: from this budget on the accuracy must be next to nothing.
        allowed: accuracy that is next to nothing.
    """
    warnings: list[SanityWarning] = []
    ordered = sorted(points, key=lambda point: point[0])
    lowest = ordered[:1]
    for budget, share in ordered[1:]:
        # Against the lowest so far, not the one before: many small rises make a large one.
        small, before = lowest[0]
        if _exceeds(share, before):
            text = f"{cell}: budget {budget:g} leaves {share} %, the smaller {small:g} only {before} %"
            warnings.append(SanityWarning("budget", text))
        elif share.value < before.value:
            lowest = [(budget, share)]
    most = [point for point in ordered if point[0] >= huge]
    if not most:
        warnings.append(SanityWarning("huge_budget", f"{cell}: no budget of {huge:g} or more was tried"))
    elif most[-1][1].value > allowed:
        budget, left = most[-1]
        text = f"{cell}: even the budget {budget:g} leaves {left} %, more than {100 * allowed:g} %"
        warnings.append(SanityWarning("huge_budget", text))
    return warnings


def check_black_box(cell: str, white_box: Share, black_box: Share) -> list[SanityWarning]:
    """Warn when an attack without gradients (Square) beats the white-box attack on the same pipeline.

    The white-box attack knows all that the other knows. If it loses, gradients are masked or it was not run
    to its end. Source: Athalye et al. 2018 ("black-box attacks are better than white-box attacks"); Square is
    in Croce and Hein's 2020 ensemble for this purpose.

    Args:
        cell: names target and defence in the message.
        white_box: accuracy under the white-box attack.
        black_box: accuracy under the black-box attack, of the same budget and images.
    """
    if _exceeds(white_box, black_box):
        text = f"{cell}: Square leaves {black_box} %, the white-box attack {white_box} %"
        return [SanityWarning("black_box", text)]
    return []


def check_one_step(cell: str, one_step: Share, iterative: Share) -> list[SanityWarning]:
    """Warn when one step beats many: the many are stuck, so the loss or step size is at fault.

    Source: Athalye et al. 2018 ("one-step attacks perform better than iterative attacks").

    Args:
        cell: names target and defence in the message.
        one_step: accuracy under FGSM.
        iterative: accuracy under BIM or PGD of the same budget and images.
    """
    if _exceeds(iterative, one_step):
        text = f"{cell}: one step leaves {one_step} %, many steps {iterative} %"
        return [SanityWarning("one_step", text)]
    return []


def check_purified_clean(
    defended: Iterable[tuple[str, str]], clean: Collection[tuple[str, str]]
) -> list[SanityWarning]:
    """Warn about defended numbers that have no purified clean accuracy beside them.

    What a defence costs on images nobody attacked is half of what it does. Source: Carlini et al. 2019, the
    checklist ("report clean model accuracy when not under attack").

    Args:
        defended: (target, defence) of every number under attack.
        clean: (target, defence) whose accuracy on defended clean images is known.
    """
    missing = sorted(set(defended) - set(clean))
    return [
        SanityWarning("purified_clean", f"{target}, {defence}: accuracy on purified clean images is missing")
        for target, defence in missing
    ]


def _exceeds(larger: Share, smaller: Share, tolerance: float = 0.0) -> bool:
    """Return whether a share is larger by more than the tolerance, beyond the intervals of both.

    The limits are combined as for independent samples (Newcombe 1998), which for the same images, whose
    outcomes go together, is on the side of fewer warnings.
    """
    margin = np.hypot(larger.value - larger.low, smaller.high - smaller.value)
    return bool(larger.value - smaller.value - margin > tolerance)
