"""The encoders of table 1: how each is trained, and the commands that do it.

Pairs that differ by the RST term alone (`alpha`) share network, initialisation, schedule and seed.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EncoderRecipe:
    """One row of table 1."""

    title: str
    start: str | None
    """Encoder whose weights it starts from; None: random."""
    method: str = "rst"
    alpha: float = 0.0
    """Weight of the RST term; 0 is plain PGD adversarial training."""


ENCODERS = {
    "pgdat-random": EncoderRecipe("PGDAT (random)", None),
    "rst-random": EncoderRecipe("PGDAT + RST (random)", None, alpha=0.1),
    "pgdat": EncoderRecipe("PGDAT (PGDAT)", "pgdat-random"),
    "pgdat-rst": EncoderRecipe("PGDAT + RST (PGDAT)", "pgdat-random", alpha=0.1),
    "trades": EncoderRecipe("TRADES (random)", None, method="trades"),
    "rst-trades": EncoderRecipe("PGDAT + RST (TRADES)", "trades", alpha=0.1),
}
"""By folder name, in the order in which they can be trained."""

BASELINE, SEMANTICS = "baseline", "semantics"
BASELINE_TITLE = "No defense (f_bsl)"


@dataclass(frozen=True)
class Schedule:
    """What a variant can afford."""

    architecture: str
    attack_steps: int
    """Of the PGD inside."""
    baseline_epochs: int
    epochs: int
    """From random weights."""
    trades_epochs: int
    tuning_epochs: int
    """From trained weights."""
    flags: tuple[str, ...] = ()


SMALL = Schedule("wrn-16-1", 2, 10, 5, 4, 2, flags=("--run.workers", "0"))
FULL = Schedule("wrn-34-10", 10, 100, 100, 100, 20)


def schedule_of(small: bool) -> Schedule:
    """Return the schedule of a variant."""
    return SMALL if small else FULL


def encoder_arguments(path: Path, small: bool) -> tuple[str, list[str], list[Path]]:
    """Return the job of one artifact, its arguments but shards and output, and the artifacts it needs first.

    Args:
        path: folder of the artifact; its name is `baseline`, `semantics` or a key of `ENCODERS`.
        small: for two cores.
    """
    plan, folder = schedule_of(small), path.parent
    baseline, semantics = folder / BASELINE, folder / SEMANTICS
    if path.name == BASELINE:
        flags = ["--architecture", plan.architecture, *_optimizer(plan.baseline_epochs, 0.2)]
        return "train_baseline", [*flags, *plan.flags], []
    if path.name == SEMANTICS:
        flags = ["--baseline", str(baseline), "--elbow.k-max", "4", "--elbow.no-one-blob-test"]
        return "learn_semantics", flags, [baseline]
    recipe = ENCODERS[path.name]
    flags = ["--baseline", str(baseline), "--semantics", str(semantics), "--attack.steps"]
    flags += [str(plan.attack_steps), "--method", recipe.method, "--alpha", f"{recipe.alpha:g}"]
    if recipe.start is None:
        epochs = plan.trades_epochs if recipe.method == "trades" else plan.epochs
        flags += ["--init", "random", *_optimizer(epochs, 0.2)]
    else:
        # Another seed than the first training's, so that the images come in a new order.
        flags += ["--init", str(folder / recipe.start), *_optimizer(plan.tuning_epochs, 0.05), "--seed", "2"]
    needed = [baseline, semantics, *([folder / recipe.start] if recipe.start else [])]
    return "train_robust", [*flags, *plan.flags], needed


def _optimizer(epochs: int, peak_lr: float) -> list[str]:
    return ["--optimizer.epochs", str(epochs), "--optimizer.peak-lr", f"{peak_lr:g}"]
