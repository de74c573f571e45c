"""Where presets find data and trained artifacts, and the commands that make what is missing."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from acsr_ray.evaluation.encoder_recipes import encoder_arguments, schedule_of
from acsr_ray.evaluation.grid import Grid, GridError
from acsr_ray.evaluation.purifier_recipes import SHARDS, purifier_arguments

Variant = Literal["small", "full"]

DEFENSE_KINDS = {
    "magnet": "magnet",
    "pixel-cnn": "pixel_cnn",
    "stl": "global_dictionary",
    "patch-bank": "patch_bank",
}
"""Suffix of an artifact's folder -> kind of `train_defense`."""

SMALL_STEPS = {"magnet": 2500, "pixel_cnn": 8000}
"""Gradient steps of the rivals that the small tables were measured with."""

PRETRAINING = "imagenet10-64"
"""Data set of the weights that the transfer-learning ablation starts from."""

IMAGENET_BUNDLE = "imagenet10-small"
"""Packaged bundle of ImageNet-10."""


@dataclass(frozen=True)
class Place:
    """Where a preset finds what it needs."""

    variant: Variant
    data: Path
    artifacts: Path
    bundle: str

    @property
    def small(self) -> bool:
        """Whether this is the variant for two cores."""
        return self.variant == "small"

    @property
    def width(self) -> float:
        """Width factor of the paper's targets."""
        return 0.25 if self.small else 1.0

    def width_of(self, architecture: str) -> float:
        """Return the width factor of a target; ResNet-9 is there for a small target above 85 %."""
        return 0.375 if self.small and architecture == "resnet9" else self.width

    def splits(self, name: str) -> tuple[list[str], list[str], list[str]]:
        """Return the shards of train, validation and test of a data set, see `find_splits`."""
        return find_splits(self.data / name)

    def target(self, data: str, architecture: str, suffix: str = "") -> Path:
        """Return the folder of a target."""
        return self.artifacts / "targets" / f"{data}-{architecture}{suffix}-w{self.width_of(architecture):g}"

    def defense(self, data: str, kind: str) -> Path:
        """Return the folder of a trained defence."""
        return self.artifacts / "defenses" / f"{data}-{kind}"

    def encoder(self, name: str) -> Path:
        """Return the folder of an encoder of table 1."""
        return self.artifacts / "encoders" / f"cifar10-{schedule_of(self.small).architecture}" / name

    def reconstruction(self, name: str) -> Path:
        """Return the folder of a bundle whose reconstruction was trained for the ablations."""
        return self.artifacts / "bundles" / f"cifar10-{name}"

    @property
    def surrogates(self) -> tuple[Path, Path, Path]:
        """Return what purifiers are trained against; no target of a grid that judges them is among them."""
        return (
            self.encoder("baseline"),
            self.target("cifar10", "alexnet"),
            self.target("cifar10", "resnet50"),
        )

    def bundle_of(self, data: str) -> str:
        """Return the bundle that purifies a data set; content filters are out of distribution (T5)."""
        return IMAGENET_BUNDLE if data.startswith("imagenet10") else self.bundle


def find_splits(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return training, validation and test shards of a folder.

    Test is `test-*`, or `val-*` where there is no test; validation is `validation-*`, or `val-*` beside a
    test, else the last training shard, which then is no training shard.

    Raises:
        GridError: a split is missing.
    """
    found = {
        name: sorted(str(path) for path in folder.glob(f"{name}-*.parquet"))
        for name in ("train", "validation", "val", "test")
    }
    train, test = found["train"], found["test"] or found["val"]
    validation = found["validation"] or (found["val"] if found["test"] else [])
    if not validation and len(train) > 1:
        train, validation = train[:-1], train[-1:]
    if not (train and validation and test):
        raise GridError(
            f"{folder} needs train-*, test-* (or val-*) and validation shards; make them with "
            f"jobs/prepare_corpus.py"
        )
    return train, validation, test


def needed_artifacts(grid: Grid, place: Place) -> list[Path]:
    """Return the artifacts of a grid that lie below the artifacts' folder."""
    locations = [Path(target.location) for target in grid.targets]
    locations += [Path(d.config.artifact) for d in grid.defenses if d.config.artifact is not None]
    return [path for path in dict.fromkeys(locations) if path.is_relative_to(place.artifacts)]


def recipe(path: Path, place: Place) -> list[str]:
    """Return the commands that make one artifact of a preset."""
    kind, name = path.parent.name, path.name
    if kind == "targets":
        data, architecture, *rest = name.rsplit("-w", 1)[0].split("-", 2)
        if architecture in ("64", "128"):
            data, architecture = f"{data}-{architecture}", rest[0]
        flags = target_flags(data, architecture, "-adv" in name, place)
        if place.small and architecture == "resnet9" and "-start" not in name:
            # A warm restart: ten epochs alone end a point below 85 %.
            start = place.target(data, architecture, "-start")
            again = [*flags[:-4], "--optimizer.epochs", "4", "--optimizer.peak-lr", "0.05", "--seed", "1"]
            restart = _command("train_target", data, path, place, [*again, "--init-weights", str(start)])
            return [*_unless_there(start, place), restart]
        if "-pre" in name:
            # Only the initialisation differs from the target trained from scratch.
            start = place.target(PRETRAINING, architecture)
            from_start = _command("train_target", data, path, place, [*flags, "--init-weights", str(start)])
            return [*_unless_there(start, place), from_start]
        return [_command("train_target", data, path, place, flags)]
    if kind == "defenses":
        data, made = name.rsplit("-", 1)[0], name
        for known, job_kind in DEFENSE_KINDS.items():
            if name.endswith(f"-{known}"):
                data, made = name.removesuffix(f"-{known}"), job_kind
        flags = ["--kind", made, "--image-size", str(image_size(data))]
        steps = SMALL_STEPS.get(made) if place.small else None
        if steps is not None:
            flags += [f"--{made.replace('_', '-')}.steps", str(steps)]
        return [_command("train_defense", data, path, place, flags, validated=False)]
    if kind == "bundles":
        return _purifier_commands(path, place)
    return _encoder_commands(path, place)


def _purifier_commands(path: Path, place: Place) -> list[str]:
    """Return the commands of an ablation's purifier and, before it, of its surrogates."""
    name = path.name.removeprefix("cifar10-")
    flags, needed = purifier_arguments(
        name, place.surrogates, place.encoder("pgdat"), place.bundle, place.small
    )
    before = [command for artifact in needed for command in _unless_there(artifact, place)]
    shards = SHARDS[place.small]
    return [*before, _command("train_purifier", "cifar10", path, place, flags, shards=shards)]


def _encoder_commands(path: Path, place: Place) -> list[str]:
    """Return the commands of an encoder of table 1 and, before it, of what it needs."""
    job, flags, needed = encoder_arguments(path, place.small)
    before = [command for artifact in needed for command in _unless_there(artifact, place)]
    validated = job != "learn_semantics"
    return [*before, _command(job, "cifar10", path, place, flags, validated=validated)]


def _unless_there(path: Path, place: Place) -> list[str]:
    return [] if (path / "manifest.json").exists() else recipe(path, place)


def image_size(data: str) -> int:
    """Return the side of a data set's images, by its name."""
    return {"cifar10": 32, "moderation5": 64}.get(data) or int(data.rsplit("-", 1)[-1])


def target_flags(data: str, architecture: str, adversarial: bool, place: Place) -> list[str]:
    """Return the training flags of one target; epochs of `small` fit two cores."""
    size, epochs = image_size(data), 40
    flags = [
        "--architecture",
        architecture,
        "--width",
        f"{place.width_of(architecture):g}",
        "--image-size",
        str(size),
    ]
    if place.small:
        epochs = {
            ("cifar10", "vgg16"): 18,
            ("cifar10", "alexnet"): 10,
            ("cifar10", "resnet50"): 7,
            ("cifar10", "googlenet"): 6,
            ("cifar10", "resnet9"): 10,
            ("imagenet10-128", "vgg16"): 12,
            ("imagenet10-64", "resnet50"): 12,
            ("moderation5", "resnet50"): 12,
        }.get((data, architecture), 20)
        if architecture == "resnet50":
            flags += ["--stem-stride", str(size // 16)]
        elif size > 32:
            flags += ["--stem-stride", str(size // 32)]
    if adversarial:
        kind = "single_step" if place.small else "pgd"
        flags += ["--adversarial", "--attack.kind", kind, "--attack.epsilon", "0.0157"]
    if architecture == "resnet9":
        flags += ["--optimizer.peak-lr", "0.2"]
    return [*flags, "--optimizer.epochs", str(epochs)]


def _command(
    job: str,
    data: str,
    output: Path,
    place: Place,
    flags: Sequence[str],
    *,
    validated: bool = True,
    shards: int | None = None,
) -> str:
    """Return a command line; `shards` takes only the first so many of the training split."""
    train, validation, _ = place.splits(data)
    train = train[:shards]
    parts = ["python", f"jobs/{job}.py", "--train", *train]
    if validated:
        parts += ["--validation", *validation]
    return shlex.join([*parts, "--output", str(output), *flags])
