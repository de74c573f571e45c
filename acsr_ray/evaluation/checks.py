"""The sanity checks of METHOD on one (data, target) of a sweep, and which of them could not be made."""

from collections.abc import Iterator, Sequence

from acsr_ray.attacks.threat import Norm
from acsr_ray.evaluation.grid import CLEAN, SweepAttack
from acsr_ray.evaluation.intervals import Share
from acsr_ray.evaluation.sanity import (
    SanityWarning,
    check_black_box,
    check_budgets,
    check_noise,
    check_one_step,
    check_purified_clean,
)
from acsr_ray.evaluation.scenes import NONE, Scene

HUGE = {"linf": 0.25, "l2": 10.0, "relative_l2": 0.5}
"""From this radius on, an iterative white-box attack must leave next to nothing."""
ITERATIVE = ("bim", "pgd", "apgd")
SEEING = ("white_box", "white_box_fixed", "bpda")


def scene_warnings(scene: Scene) -> Iterator[SanityWarning]:
    """Run the sanity checks of METHOD on one (data, target)."""
    grid = scene.grid
    defended, clean = [], []
    for defense in scene.defenses:
        label = f"{scene.title}, {defense.name}"
        unharmed = scene.cell(CLEAN, defense.name)
        if unharmed is not None:
            clean.append((scene.target, defense.name))
        for attack in grid.attacks:
            cell = scene.cell(attack.name, defense.name)
            if cell is None:
                continue
            defended.append((scene.target, defense.name))
            if attack.attack.name == "noise" and unharmed is not None:
                same = unharmed.head(cell.images).accuracy
                yield from check_noise(f"{label}, {cell.budget}", same, cell.accuracy)
        yield from _budget_warnings(scene, defense.name, label)
        yield from _black_box_warnings(scene, defense.name, label)
    yield from _one_step_warnings(scene)
    yield from check_purified_clean(defended, clean)


def _budget_warnings(scene: Scene, defense: str, label: str) -> Iterator[SanityWarning]:
    for (name, norm, knowledge), points in budget_series(scene, defense).items():
        if len(points) > 1:
            huge = HUGE[norm]
            yield from check_budgets(f"{label}, {name} {norm} {knowledge}", points, huge=huge)


def budget_series(scene: Scene, defense: str) -> dict[tuple[str, str, str], list[tuple[float, Share]]]:
    """Return (radius, accuracy) of the iterative white-box attacks, by (attack, norm, knowledge)."""
    series: dict[tuple[str, str, str], list[tuple[float, Share]]] = {}
    for attack in scene.grid.attacks:
        config, cell = attack.attack, scene.cell(attack.name, defense)
        white = sees_all(attack, defense)
        # A calibrated budget is another one for each target, and close to its neighbours.
        fixed = config.name in ITERATIVE and attack.calibrate_to is None
        if cell is not None and white and fixed and config.epsilon is not None:
            points = series.setdefault((config.name, config.norm, attack.knowledge), [])
            points.append((config.epsilon, cell.accuracy))
    return series


def unmade_checks(scenes: Sequence[Scene]) -> tuple[str, ...]:
    """Return a sentence that names the checks that a sweep's grid leaves no way to make; () for none."""
    attacks = scenes[0].grid.attacks if scenes else ()
    unmade = []
    for norm, epsilon in _unmatched_budgets(attacks).items():
        unmade.append(f"random noise of {norm.replace('_', ' ')} {epsilon:.3g} is harmless (none so large)")
    several = (
        len(points) > 1
        for scene in scenes
        for defense in scene.defenses
        for points in budget_series(scene, defense.name).values()
    )
    if not any(several):
        unmade.append("white-box attacks get stronger with the budget (fewer than two budgets)")
    if not any(attack.attack.name == "square" for attack in attacks):
        unmade.append("Square does not beat the white box (no Square in the grid)")
    if not attacks or not unmade:
        return ()
    return (f"Not checked here: {'; '.join(unmade)}. `--table adaptive` checks them all.",)


def _unmatched_budgets(attacks: Sequence[SweepAttack]) -> dict[Norm, float]:
    """Return the largest radius of each norm that no noise in the grid reaches, huge ones left out."""
    largest: dict[Norm, float] = {}
    noise: dict[Norm, float] = {}
    for attack in attacks:
        norm, epsilon = attack.attack.norm, attack.attack.epsilon
        if epsilon is None or epsilon >= HUGE[norm]:
            continue
        reached = noise if attack.attack.name == "noise" else largest
        # A calibrated radius is not known here; calibration starts from a larger one.
        reached[norm] = max(epsilon, reached.get(norm, 0.0))
    return {norm: epsilon for norm, epsilon in largest.items() if epsilon > noise.get(norm, 0.0)}


def sees_all(attack: SweepAttack, defense: str) -> bool:
    """Return whether the attack has gradients of all that classifies; without a defence, gray box does."""
    return attack.knowledge in SEEING or (attack.knowledge == "gray_box" and defense == NONE)


def _black_box_warnings(scene: Scene, defense: str, label: str) -> Iterator[SanityWarning]:
    for square in scene.grid.attacks:
        black = scene.cell(square.name, defense)
        if square.attack.name != "square" or black is None:
            continue
        rivals = [
            cell.head(black.images)
            for attack in scene.grid.attacks
            for cell in (scene.cell(attack.name, defense),)
            if cell is not None
            and attack.attack.name in ITERATIVE
            and sees_all(attack, defense)
            and (attack.attack.norm, attack.attack.epsilon) == (square.attack.norm, square.attack.epsilon)
            and len(cell) >= len(black)
        ]
        if rivals:
            strongest = min(rivals, key=lambda cell: cell.accuracy.value)
            yield from check_black_box(label, strongest.accuracy, black.accuracy)


def _one_step_warnings(scene: Scene) -> Iterator[SanityWarning]:
    for one in scene.grid.attacks:
        if one.attack.name != "fgsm" or one.calibrate_to is not None:
            continue
        for many in scene.grid.attacks:
            same = (many.attack.norm, many.attack.epsilon) == (one.attack.norm, one.attack.epsilon)
            if not same or many.attack.name not in ITERATIVE or many.calibrate_to is not None:
                continue
            if sees_all(one, NONE) and sees_all(many, NONE):
                first, second = scene.cell(one.name, NONE), scene.cell(many.name, NONE)
                if first is not None and second is not None and len(first) == len(second):
                    yield from check_one_step(f"{scene.title}, bare", first.accuracy, second.accuracy)
