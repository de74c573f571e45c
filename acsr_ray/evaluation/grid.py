"""A sweep as a frozen value: data x target x attack x budget x defence x seed, read from YAML or a preset.

Every (data, target, defence) also gets its clean cell, so purified clean accuracy stands beside every
defended number.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from acsr_ray.attacks.spec import RANDOM, AttackConfig
from acsr_ray.config import AcsrError, Described, did_you_mean
from acsr_ray.evaluation.defenses import DefenseConfig
from acsr_ray.models.targets import TargetConfig

Knowledge = Literal[
    "gray_box",
    "transfer",
    "transfer_purifier",
    "bpda",
    "white_box",
    "white_box_fixed",
    "low_frequency",
    "selection",
]
CLEAN = "clean"


class GridError(AcsrError, ValueError):
    """A grid that cannot be run; the message names the entry."""


class EvaluationData(Described):
    """One data set: its test split, and the split that every parameter is chosen on."""

    name: str
    """What tables call it."""
    test: tuple[str, ...] = Field(min_length=1)
    """Labelled Parquet shards or folders of them."""
    validation: tuple[str, ...] = ()
    """Labelled shards for calibration and for choosing strengths; never the test split."""
    image_size: int = Field(32, ge=11)
    """Side in pixels to which images are brought; SSIM needs 11."""
    images: int | None = Field(None, ge=1)
    """Test images, drawn with the seed of the grid; None takes the whole split."""
    validation_images: int = Field(500, ge=1)
    """Validation images, drawn with the seed of the grid."""


class SweepTarget(Described):
    """One classifier to attack and to defend."""

    name: str
    """What tables call it."""
    location: str
    """See `acsr_ray.models.targets.load_target`."""
    config: TargetConfig | None = None
    """Only for files of weights."""
    data: tuple[str, ...] | None = None
    """Data sets it serves; None is all."""
    source_only: bool = False
    """Whether it only lends its gradients to `transfer` attacks and is not itself defended."""


class SweepAttack(Described):
    """One attack, and what its attacker knows."""

    name: str
    """What tables call it."""
    attack: AttackConfig
    """The attack and its budget."""
    knowledge: Knowledge = "gray_box"
    """What the gradients or queries go through: the bare target (`gray_box`), another bare target
    (`transfer`), the target behind another defence (`transfer_purifier`), target and defence with the
    identity as the defence's gradient (`bpda`), both with true gradients (`white_box`; with the dictionaries
    chosen once for the clean image, `white_box_fixed`), both, perturbing low frequencies only
    (`low_frequency`), or the encoder's choice of a cluster (`selection`)."""
    source: str | None = None
    """`transfer`: name of the target it is crafted on."""
    through: str | None = None
    """`transfer_purifier`: name of the defence in the grid whose true gradients it follows."""
    calibrate_to: float | None = Field(None, ge=0, le=1)
    """Accuracy of the bare target, as a share of its clean accuracy, that the budget is calibrated to on the
    validation split (METHOD, B0); None takes the budget as it stands."""
    eot_samples: int = Field(1, ge=1)
    """Draws that the gradient is averaged over when the defence is random."""
    images: int | None = Field(None, ge=1)
    """Only the first so many test images, for costly attacks."""
    defenses: tuple[str, ...] | None = None
    """Names of the defences it is run against; None is all."""
    block: str = ""
    """Heading under which tables group it."""

    @property
    def adaptive(self) -> bool:
        """Whether the attack depends on the defence."""
        return self.knowledge not in ("gray_box", "transfer", "transfer_purifier")

    @property
    def random(self) -> bool:
        """Whether the attack draws random numbers; a random defence that it sees draws more."""
        return self.attack.name in RANDOM or self.attack.is_torchattacks

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.knowledge == "transfer") != (self.source is not None):
            raise ValueError("transfer, and only transfer, has a source")
        if (self.knowledge == "transfer_purifier") != (self.through is not None):
            raise ValueError("transfer_purifier, and only transfer_purifier, goes through another defence")
        if self.calibrate_to is not None and self.knowledge != "gray_box":
            raise ValueError("only gray_box budgets are calibrated")
        return self


class SweepDefense(Described):
    """One defence at one strength."""

    name: str
    """What tables call it; unique in the grid."""
    config: DefenseConfig
    """What it is."""
    family: str | None = None
    """Defences that differ only in strength share a family; strengths are chosen within it."""
    data: tuple[str, ...] | None = None
    """Data sets it serves; None is all."""

    @property
    def group(self) -> str:
        """Family, or the name where it stands alone."""
        return self.family or self.name


class Grid(Described):
    """A sweep."""

    title: str
    """Heading of the report."""
    caption: str = ""
    """What a reader must know: sizes, what was left out."""
    layout: Literal["defenses", "targets", "filter", "ranks", "strengths", "adaptive", "panels"] = "defenses"
    """How results are laid out; see `acsr_ray.evaluation.layouts`."""
    data: tuple[EvaluationData, ...] = Field(min_length=1)
    """Data sets."""
    targets: tuple[SweepTarget, ...] = Field(min_length=1)
    """Classifiers."""
    attacks: tuple[SweepAttack, ...] = ()
    """Attacks; clean images are always measured."""
    defenses: tuple[SweepDefense, ...] = Field(min_length=1)
    """Defences; one of them should be `none`."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Repetitions of attacks that draw random numbers; the first also draws the images."""
    chunk: int = Field(100, ge=1)
    """Images per unit of work."""
    clean_loss: tuple[float, ...] = (0.01, 0.03, 0.06)
    """Losses of clean accuracy, as shares of all images, at which families are compared: within each family
    the strongest defence whose clean accuracy on the validation split loses no more."""
    choose: bool = False
    """Whether strengths are chosen so; costs a pass of every defence over the validation images."""
    reference: str | None = None
    """Family that the others are tested against (McNemar); None for no tests."""

    def targets_of(self, data: str) -> tuple[SweepTarget, ...]:
        """Return the targets that are defended on a data set."""
        return tuple(t for t in self.targets if not t.source_only and (t.data is None or data in t.data))

    def defenses_of(self, data: str) -> tuple[SweepDefense, ...]:
        """Return the defences that serve a data set."""
        return tuple(d for d in self.defenses if d.data is None or data in d.data)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for entries in (self.data, self.targets, self.attacks, self.defenses):
            names = [entry.name for entry in entries]
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"names must differ: {', '.join(sorted(twice))}")
        if any(attack.name == CLEAN for attack in self.attacks):
            raise ValueError(f"an attack may not be called {CLEAN!r}")
        self._check_served()
        known = [target.name for target in self.targets]
        defended = [defense.name for defense in self.defenses]
        for attack in self.attacks:
            if attack.source and attack.source not in known:
                raise ValueError(f"unknown source {attack.source!r}{did_you_mean(attack.source, known)}")
            for name in (*(attack.defenses or ()), *([attack.through] if attack.through else [])):
                if name not in defended:
                    raise ValueError(f"unknown defence {name!r}{did_you_mean(name, defended)}")
        needs = self.choose or any(attack.calibrate_to is not None for attack in self.attacks)
        if needs and not all(data.validation for data in self.data):
            raise ValueError("calibration and choice of strengths need validation shards for every data set")
        groups = [defense.group for defense in self.defenses]
        if self.reference is not None and self.reference not in groups:
            raise ValueError(f"unknown reference {self.reference!r}{did_you_mean(self.reference, groups)}")
        if self.layout == "ranks" and groups.count("rank") < 2:
            raise ValueError("the layout ranks needs two defences or more of the family 'rank'")
        return self

    def _check_served(self) -> None:
        """Raise `ValueError` when a name of a data set is unknown, or a data set would have no cell."""
        known = [data.name for data in self.data]
        restricted = [(entry.name, entry.data) for entry in self.targets]
        restricted += [(entry.name, entry.data) for entry in self.defenses]
        for owner, names in restricted:
            for name in names or ():
                if name not in known:
                    raise ValueError(f"{owner}: unknown data {name!r}{did_you_mean(name, known)}")
        for name in known:
            if not self.targets_of(name) or not self.defenses_of(name):
                raise ValueError(f"no target or no defence serves data {name!r}")


def read_grid(path: Path) -> Grid:
    """Read a grid from a YAML file; `GridError` says what is wrong with it."""
    try:
        content: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GridError(f"{path} is not readable YAML: {error}") from error
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or 'grid'}: {item['msg']}" for item in error.errors()]
        raise GridError(f"{path}: {'; '.join(lines)}") from error
