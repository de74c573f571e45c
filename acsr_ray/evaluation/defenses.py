"""Defences by name: settings to a `Defense`, its label and its fingerprint.

A sweep names its defences by `DefenseConfig`. Each defence takes some parameters and refuses the others, so
that a cell of a table cannot carry a number that did nothing.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from acsr_ray.artifacts import MANIFEST, ArtifactError, artifact_digest
from acsr_ray.config import ConfigError, Described, did_you_mean
from acsr_ray.defenses.base import Defense
from acsr_ray.evaluation.cluster_defenses import PurifierDefense
from acsr_ray.evaluation.defense_registry import DEFENSES, OPTIONS, BuildRequest
from acsr_ray.purification.bundle import ALGORITHM_VERSION, find_bundle, load_bundle
from acsr_ray.purification.options import Precision, PurifyOptions, Reconstruction, Strength

__all__ = [
    "DEFENSES",
    "DefenseConfig",
    "PurifierDefense",
    "build_defense",
    "defense_digest",
    "defense_label",
]

DEFENSES_VERSION = 1
"""Raised when the same settings would give other pixels; part of every fingerprint."""

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]


class DefenseConfig(Described):
    """One defence of a sweep. Parameters left out take the defence's own default."""

    name: str
    """Which defence; see `DEFENSES` in the registry."""
    artifact: str | None = None
    """Directory of what was trained for it, or of a bundle (or the name of a packaged one)."""
    seed: int = 0
    """Source of randomness of randomised defences, and of random atoms."""
    quality: int | None = Field(None, ge=1, le=100)
    """jpeg: quality."""
    subsampling: Subsampling | None = None
    """jpeg: of the chroma channels."""
    size: int | None = Field(None, ge=2)
    """median: side of the window in pixels."""
    sigma: float | None = Field(None, gt=0)
    """gaussian: standard deviation in pixels; pixel_deflection: of the noise, for images in [0, 1]."""
    weight: float | None = Field(None, gt=0)
    """tvm, tvm_dropout: weight of the total variation."""
    keep: float | None = Field(None, gt=0, le=1)
    """tvm_dropout: probability that a pixel is kept."""
    neighbours: int | None = Field(None, ge=1)
    """quilting: K nearest patches to draw from."""
    overlap: int | None = Field(None, ge=0)
    """quilting: rows and columns that neighbouring patches share."""
    seams: bool | None = None
    """quilting: join patches by the cut of least difference."""
    crops: int | None = Field(None, ge=1)
    """crop_ensemble: how many."""
    crop: float | None = Field(None, gt=0, le=1)
    """crop_ensemble: side of a crop as a share of the image's."""
    deflections: int | None = Field(None, ge=0)
    """pixel_deflection: pixels replaced."""
    window: int | None = Field(None, ge=1)
    """pixel_deflection: largest distance of the pixel copied."""
    epsilon: float | None = Field(None, ge=0)
    """pixel_defend: radius of the L_inf ball for images in [0, 1]."""
    lmbda: float | None = Field(None, gt=0)
    """Sparse coding: weight of the l1 term in place of the artifact's; the ADMM penalty scales along."""
    reconstruction: Reconstruction | None = None
    """acsr: `cbpdn` or `unrolled`; the bundle's default when omitted."""
    strength: Strength | None = None
    """acsr: factor on lmbda or on the network's change, or `auto`; the bundle's default when omitted."""
    top_k: int | None = Field(None, ge=1)
    """acsr: clusters to reconstruct with and average."""
    precision: Precision | None = None
    """acsr: of the unrolled network."""
    reselect: int | None = Field(None, ge=0)
    """acsr: how often the cluster is chosen anew from the purified image."""
    rank: int | None = Field(None, ge=1)
    """rank: 1 for the nearest cluster, 2 for the next, and so on."""
    cluster: int | None = Field(None, ge=0)
    """cluster: position among the bundle's clusters, from 0."""

    @model_validator(mode="before")
    @classmethod
    def _suggest_parameters(cls, values: Any) -> Any:  # noqa: ANN401
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise ConfigError(f"unknown key {key!r}{did_you_mean(str(key), list(cls.model_fields))}")
        return values

    @model_validator(mode="after")
    def _check_parameters(self) -> "DefenseConfig":
        if self.name not in DEFENSES:
            raise ConfigError(f"unknown defence {self.name!r}{did_you_mean(self.name, list(DEFENSES))}")
        entry, given = DEFENSES[self.name], self.given()
        for key in given:
            if key not in entry.defaults:
                others = [name for name, other in DEFENSES.items() if key in other.defaults]
                takes = f"takes {', '.join(entry.defaults)}" if entry.defaults else "takes no parameters"
                raise ConfigError(f"{self.name} has no {key}: it {takes}; {key} is of {', '.join(others)}")
        missing = [key for key, value in entry.defaults.items() if value is ... and key not in given]
        if missing:
            raise ConfigError(f"{self.name} needs {', '.join(missing)}")
        if self.artifact is not None and entry.artifact is None:
            raise ConfigError(f"{self.name} needs no artifact, got {self.artifact!r}")
        return self

    @property
    def randomized(self) -> bool:
        """Whether the defence draws random numbers."""
        return DEFENSES[self.name].randomized

    def given(self) -> dict[str, Any]:
        """Return the parameters that were set."""
        values = self.model_dump(exclude={"name", "artifact", "seed"})
        return {key: value for key, value in values.items() if value is not None}

    def parameters(self) -> dict[str, Any]:
        """Return every parameter of the defence, defaults filled in; None leaves it to the artifact."""
        return {**DEFENSES[self.name].defaults, **self.given()}


def build_defense(config: DefenseConfig, device: str = "cpu") -> Defense:
    """Return a defence ready for use.

    Args:
        config: which one, and its parameters.
        device: where networks and solvers run; filters follow the images.

    Raises:
        ArtifactError: what it needs is missing or of another kind; the message says how to make it.
        ConfigError: parameters that do not fit the artifact, or a library that is not installed.
    """
    check_artifact(config)
    entry = DEFENSES[config.name]
    try:
        defense = entry.build(BuildRequest(config.parameters(), config.artifact or "", config.seed, device))
    except ModuleNotFoundError as error:
        raise ConfigError(f"{config.name} needs {error.name}: pip install 'acsr-ray[evaluation]'") from error
    except ArtifactError:
        raise
    except ValueError as error:
        raise ConfigError(f"{config.name}: {error}") from error
    defense.seed = config.seed
    return defense.requires_grad_(False).eval()


def check_artifact(config: DefenseConfig) -> None:
    """Raise `ArtifactError` unless the artifact that a defence needs is named and there."""
    kind = DEFENSES[config.name].artifact
    if kind is None:
        return
    if kind == "bundle":
        if config.artifact is None:
            raise ArtifactError(f"{config.name} needs artifact: a bundle, made by jobs/build_bundle.py")
        if not (find_bundle(config.artifact) / MANIFEST).is_file():
            raise ArtifactError(f"{config.name}: {config.artifact} is no bundle: {MANIFEST} is missing")
        return
    command = f"jobs/train_defense.py --kind {kind} --train SHARDS --output {config.artifact or 'DIR'}"
    if config.artifact is None:
        raise ArtifactError(f"{config.name} needs artifact: a {kind}, made by `{command}`")
    if not (Path(config.artifact) / MANIFEST).is_file():
        raise ArtifactError(f"{config.name}: no {kind} at {config.artifact}; make it by `{command}`")


def defense_label(config: DefenseConfig) -> str:
    """Return a short name for tables: the title, the strength, and what differs from the defaults."""
    entry, given = DEFENSES[config.name], config.given()
    words = [entry.title]
    if entry.headline and (value := config.parameters()[entry.headline]) is not None:
        words.append(_shown(entry.headline, value))
    for key, value in given.items():
        if key != entry.headline and value != entry.defaults[key]:
            words.append(_shown(key, value) if key == "lmbda" else f"{key} {_shown(key, value)}")
    return " ".join(words)


def defense_digest(config: DefenseConfig) -> str:
    """Return canonical JSON of all that decides a defence's pixels, for the fingerprint of a sweep's cell.

    The artifact enters by its digest, not its path. Raises `ArtifactError` when it is missing or was changed.
    """
    check_artifact(config)
    # Options of the purifier enter where they differ from its own ways: a new one leaves older cells valid.
    asked = {name: value for name, value in config.given().items() if name in OPTIONS}
    changed = {}
    if asked:
        changed = load_bundle(config.artifact or "").config.changed(PurifyOptions.model_validate(asked))
    parameters = {name: value for name, value in config.parameters().items() if name not in OPTIONS} | changed
    content: dict[str, Any] = {
        "name": config.name,
        "seed": config.seed,
        "parameters": parameters,
        "defenses_version": DEFENSES_VERSION,
    }
    kind = DEFENSES[config.name].artifact
    if config.artifact is not None:
        directory = find_bundle(config.artifact) if kind == "bundle" else Path(config.artifact)
        content["artifact"] = artifact_digest(directory)
    if kind in ("bundle", "global_dictionary"):
        content["algorithm_version"] = ALGORITHM_VERSION
    return json.dumps(content, sort_keys=True)


def _shown(key: str, value: Any) -> str:  # noqa: ANN401
    if key == "epsilon" and abs(value * 255 - round(value * 255)) < 1e-6:
        return f"{round(value * 255)}/255"
    number = f"{value:g}" if isinstance(value, float) else str(value)
    return f"lambda {number}" if key == "lmbda" else number
