"""The tables of a sweep: accuracies, attacks, costs, paired tests, defences at equal clean accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from acsr_ray.evaluation.grid import CLEAN, SweepAttack
from acsr_ray.evaluation.intervals import Share
from acsr_ray.evaluation.quality import mean_psnr
from acsr_ray.evaluation.scenes import ABSENT, NONE, Scene
from acsr_ray.evaluation.statistics import mcnemar, paired_difference, risk_coverage
from acsr_ray.evaluation.tables import Table


def accuracy_table(scenes: Sequence[Scene], attacks: Sequence[SweepAttack], title: str) -> Table:
    """Return accuracies with 95 % intervals: a row per target and defence, a column per attack."""
    several = len({scene.title for scene in scenes}) > 1
    rows = []
    for scene in scenes:
        for defense in scene.defenses:
            cells = [scene.cell(name, defense.name) for name in (CLEAN, *(a.name for a in attacks))]
            if all(cell is None for cell in cells[1:]) and len(cells) > 1:
                continue
            label = (scene.target, defense.name) if several else (defense.name,)
            rows.append((*label, *(ABSENT if cell is None else str(cell.accuracy) for cell in cells)))
    first = ("target", "defence") if several else ("defence",)
    header = (*first, CLEAN, *(_counted(scenes, attack) for attack in attacks))
    caption = f"Accuracy in percent with Wilson 95 % interval. {scenes[0].grid.caption}"
    return Table(title, caption, header, tuple(rows))


def _counted(scenes: Sequence[Scene], attack: SweepAttack) -> str:
    """Return an attack's name, with its number of images where it had fewer than the clean cell."""
    for scene in scenes:
        for defense in scene.defenses:
            cell, clean = scene.cell(attack.name, defense.name), scene.cell(CLEAN, defense.name)
            if cell is not None and clean is not None and len(cell) < len(clean):
                return f"{attack.name} (first {len(cell)} images)"
    return attack.name


def attack_table(scene: Scene) -> Table:
    """Return what each attack did to the bare target, or to the pipeline that it attacked."""
    rows = []
    for attack in scene.grid.attacks:
        cells = [
            (defense.name, cell)
            for defense in scene.defenses
            for cell in (scene.cell(attack.name, defense.name),)
            if cell is not None
        ]
        # What does not see the defence is one attack for all of them.
        for name, cell in cells if attack.adaptive else cells[:1]:
            shown = cell if attack.adaptive else scene.cell(attack.name, NONE)
            # Unrounded images were shown to the source, or to the other defence, alone.
            elsewhere = attack.knowledge.startswith("transfer")
            floats = ABSENT if elsewhere else str(cell.float_accuracy)
            rows.append(
                (
                    attack.name,
                    cell.budget,
                    attack.knowledge.replace("_", "-"),
                    name if attack.adaptive else NONE,
                    ABSENT if shown is None else str(shown.accuracy),
                    floats,
                    f"{np.median(cell.relative_l2):.4f}",
                    f"{np.median(cell.l2):.3f}",
                    f"{255 * np.max(cell.linf):.1f}",
                    f"{100 * cell.scaled_back:.0f}",
                    f"{cell.attack_seconds * 1000:.0f}",
                )
            )
    header = (
        "attack",
        "budget",
        "attacker sees",
        "defence seen",
        "accuracy left, 8-bit",
        "accuracy left, float",
        "median relative l2",
        "median l2",
        "largest linf, /255",
        "scaled back, %",
        "ms/image",
    )
    caption = (
        "Attacked images count as 8-bit pixels; the float column is before rounding, first strength. Scaled "
        "back: results outside the budget that were brought back to it, ordinary for CW and DeepFool only."
    )
    return Table(f"Attacks on {scene.title}", caption, header, tuple(rows))


def cost_table(scene: Scene) -> Table:
    """Return what each defence does to clean images, and how fast."""
    rows = []
    for defense in scene.defenses:
        cell = scene.cell(CLEAN, defense.name)
        if cell is None:
            continue
        rows.append(
            (
                defense.name,
                str(cell.accuracy),
                shown_psnr(cell.psnr),
                ABSENT if np.isnan(cell.ssim).all() else f"{cell.ssim.mean():.3f}",
                f"{risk_coverage(cell.correct, cell.confidence).aurc:.3f}",
                f"{1 / cell.seconds:.0f}" if cell.seconds else ABSENT,
            )
        )
    header = ("defence", "clean accuracy", "PSNR, dB", "SSIM", "AURC", "images/s per task")
    caption = (
        "PSNR and SSIM of defended clean images, none for an ensemble, which has no one image; images/s of "
        "defence and classifier together; AURC, the area under the risk-coverage curve, smaller is better."
    )
    return Table(f"Defences on clean images of {scene.title}", caption, header, tuple(rows))


def test_table(scene: Scene, reference: str) -> Table:
    """Return exact McNemar tests of the reference family's defences against every other defence.

    Each defence of the reference family is compared with the others by attack, on the same images.
    """
    own = [defense for defense in scene.defenses if defense.group == reference]
    rows = []
    for attack in (CLEAN, *(a.name for a in scene.grid.attacks)):
        for mine in own:
            first = scene.cell(attack, mine.name)
            for other in scene.defenses:
                second = scene.cell(attack, other.name)
                if first is None or second is None or other.group == reference:
                    continue
                test = mcnemar(first.correct, second.correct)
                difference = paired_difference(first.correct, second.correct)
                rows.append(
                    (
                        attack,
                        mine.name,
                        other.name,
                        str(difference),
                        str(test.only_first),
                        str(test.only_second),
                        shown_p_value(test.p_value),
                    )
                )
    header = ("attack", "defence", "against", "difference, points", "only first", "only second", "p")
    caption = "Exact McNemar tests on the same images, not corrected for their number."
    return Table(f"{reference} against the others, {scene.title}", caption, header, tuple(rows))


@dataclass(frozen=True)
class Choice:
    """The defence of a family that is chosen on the validation split, None where none qualifies."""

    family: str
    defense: str | None
    validation: Share | None


def choose_strengths(scene: Scene, loss: float) -> list[Choice]:
    """Return each family's strongest defence that loses no more clean accuracy than `loss` on validation.

    The strongest is the one with the lowest clean accuracy that still qualifies. No test image is looked at.
    """
    bare = scene.cell(CLEAN, NONE, "validation")
    if bare is None:
        return []
    choices = []
    for family in dict.fromkeys(defense.group for defense in scene.defenses):
        cells = [
            (defense.name, cell)
            for defense in scene.defenses
            if defense.group == family
            for cell in (scene.cell(CLEAN, defense.name, "validation"),)
            if cell is not None and cell.accuracy.value >= bare.accuracy.value - loss - 1e-9
        ]
        if cells:
            name, cell = min(cells, key=lambda entry: entry[1].accuracy.value)
            choices.append(Choice(family, name, cell.accuracy))
        else:
            choices.append(Choice(family, None, None))
    return choices


def equal_clean_table(scene: Scene, loss: float) -> Table:
    """Return the families at their chosen strengths, with each attack's test accuracy."""
    rows = []
    attacks = scene.grid.attacks
    for choice in choose_strengths(scene, loss):
        if choice.defense is None or choice.validation is None:
            rows.append((choice.family, "none qualifies", *[ABSENT] * (len(attacks) + 2)))
            continue
        cells = [scene.cell(name, choice.defense) for name in (CLEAN, *(a.name for a in attacks))]
        rows.append(
            (
                choice.family,
                choice.defense,
                f"{100 * choice.validation.value:.1f}",
                *(ABSENT if cell is None else str(cell.accuracy) for cell in cells),
            )
        )
    header = (
        "family",
        "chosen",
        "validation clean",
        "test clean",
        *(_counted([scene], attack) for attack in attacks),
    )
    caption = (
        f"In each family the strongest defence that costs at most {100 * loss:g} points of clean accuracy on "
        "the validation split. Accuracy in percent on the test split, Wilson 95 % intervals."
    )
    return Table(
        f"At most {100 * loss:g} points of clean accuracy, {scene.title}", caption, header, tuple(rows)
    )


def matched_table(scene: Scene, reference: str) -> Table:
    """Return paired differences of the reference family and the others at nearly equal clean accuracy.

    Each defence of the reference family meets, of every other family, the defence whose clean accuracy on the
    validation split is nearest to its own, of two equally near the more accurate; the differences are those
    of the same test images.
    """
    attacks = scene.grid.attacks
    rows = []
    for mine in (defense for defense in scene.defenses if defense.group == reference):
        for family in dict.fromkeys(defense.group for defense in scene.defenses):
            rival = _nearest_rival(scene, mine.name, family)
            if rival is None or family in (reference, NONE):
                continue
            differences = []
            for attack in (CLEAN, *(a.name for a in attacks)):
                first, second = scene.cell(attack, mine.name), scene.cell(attack, rival)
                if first is None or second is None:
                    differences.append(ABSENT)
                else:
                    differences.append(str(paired_difference(first.correct, second.correct)))
            rows.append((mine.name, rival, *differences))
    header = ("defence", "against", CLEAN, *(_counted([scene], attack) for attack in attacks))
    caption = (
        f"Accuracy of {reference} minus that of the defence of each other family whose clean accuracy on the "
        "validation split is nearest, in points on the same test images, with 95 % intervals (Newcombe), not "
        "corrected for their number."
    )
    return Table(f"{reference} at equal clean accuracy, {scene.title}", caption, header, tuple(rows))


def best_rival_table(scene: Scene, reference: str) -> Table:
    """Return paired differences of the reference family and, attack by attack, its best rival.

    Rivals of a defence are those of other families that are at least as accurate on clean images of the
    validation split; doing nothing is none. The best is the one most accurate on the attack's *test* images,
    so the choice favours the rivals.
    """
    attacks = scene.grid.attacks
    rows = []
    for mine in (defense for defense in scene.defenses if defense.group == reference):
        rivals = _rivals(scene, mine.name, reference)
        differences = []
        for attack in (CLEAN, *(a.name for a in attacks)):
            own = scene.cell(attack, mine.name)
            met = [
                (name, cell) for name in rivals for cell in (scene.cell(attack, name),) if cell is not None
            ]
            if own is None or not met:
                differences.append(ABSENT)
                continue
            name, best = max(met, key=lambda entry: entry[1].accuracy.value)
            differences.append(f"{paired_difference(own.correct, best.correct)} ({name})")
        rows.append((mine.name, *differences))
    header = ("defence", CLEAN, *(_counted([scene], attack) for attack in attacks))
    caption = (
        f"Accuracy of {reference} minus that of the rival in brackets, the best by test accuracy, for each "
        "column on its own, of all defences of other families that are at least as accurate on clean images "
        "of the validation split. Points on the same test images, with 95 % intervals (Newcombe), not "
        "corrected for their number nor for the choice of the rival."
    )
    return Table(f"{reference} minus its best rival, {scene.title}", caption, header, tuple(rows))


def _rivals(scene: Scene, mine: str, reference: str) -> list[str]:
    own = scene.cell(CLEAN, mine, "validation")
    if own is None:
        return []
    return [
        defense.name
        for defense in scene.defenses
        if defense.group not in (reference, NONE)
        for cell in (scene.cell(CLEAN, defense.name, "validation"),)
        if cell is not None and cell.accuracy.value >= own.accuracy.value - 1e-9
    ]


def _nearest_rival(scene: Scene, mine: str, family: str) -> str | None:
    """Return the defence of a family whose clean accuracy on validation is nearest to another's."""
    own = scene.cell(CLEAN, mine, "validation")
    candidates = [
        (defense.name, cell.accuracy.value)
        for defense in scene.defenses
        if defense.group == family
        for cell in (scene.cell(CLEAN, defense.name, "validation"),)
        if cell is not None
    ]
    if own is None or not candidates:
        return None
    return min(candidates, key=lambda entry: (abs(entry[1] - own.accuracy.value), -entry[1]))[0]


def shown_psnr(values: NDArray[np.float64]) -> str:
    """Return the mean PSNR in dB of (N,) values, and how many images were left as they were."""
    if np.isnan(values).all():
        return ABSENT
    mean, unchanged = mean_psnr(torch.from_numpy(values))
    if unchanged == len(values):
        return "unchanged"
    return f"{mean:.1f}" + (f" ({unchanged} unchanged)" if unchanged else "")


def shown_p_value(value: float) -> str:
    """Return a p-value for a table."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
