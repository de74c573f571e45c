"""The registry of defences: a name and its parameters, as settings, to a `Defense`.

A sweep names its defences by `DefenseConfig`. Each defence takes some parameters and refuses the others, so
that a cell of a table cannot carry a number that did nothing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from acsr_ray.artifacts import ArtifactError, artifact_digest
from acsr_ray.config import ConfigError, Described, did_you_mean
from acsr_ray.defenses.base import Defense, Identity
from acsr_ray.evaluation.cluster_defenses import (
    FixedCluster,
    NearestCluster,
    PurifierDefense,
    RandomCluster,
    RankedCluster,
)
from acsr_ray.evaluation.dictionary_defenses import (
    DictionaryDefense,
    LowBand,
    dct_atoms,
    random_atoms,
)
from acsr_ray.evaluation.learned_defenses import Magnet, PixelDefend
from acsr_ray.models.autoencoder import load_autoencoder
from acsr_ray.models.pixel_cnn import load_pixel_cnn
from acsr_ray.purification.bundle import ALGORITHM_VERSION, Bundle, bundle_digest, load_bundle
from acsr_ray.purification.purifier import Purifier
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.training.global_dictionary import load_global_dictionary

__all__ = [
    "DEFENSES",
    "DefenseConfig",
    "DefenseEntry",
    "PurifierDefense",
    "build_defense",
    "defense_digest",
    "defense_label",
]

DEFENSES_VERSION = 1
"""Raised when the same settings would give other pixels; part of every fingerprint."""

ArtifactKind = Literal["magnet", "pixel_cnn", "global_dictionary", "patch_bank", "bundle"]
Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
Parameters = Mapping[str, Any]


class DefenseConfig(Described):
    """One defence of a sweep. Parameters left out take the defence's own default."""

    name: str
    """Which defence; see `DEFENSES`."""
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

    def given(self) -> dict[str, Any]:
        """Return the parameters that were set."""
        values = self.model_dump(exclude={"name", "artifact", "seed"})
        return {key: value for key, value in values.items() if value is not None}

    def parameters(self) -> dict[str, Any]:
        """Return every parameter of the defence, defaults filled in; None leaves it to the artifact."""
        return {**DEFENSES[self.name].defaults, **self.given()}


Build = Callable[[Parameters, DefenseConfig, str], Defense]


@dataclass(frozen=True)
class DefenseEntry:
    """What the registry knows of a defence: title, builder, defaults (`...` for required), artifact.

    `headline` is the parameter that a label always shows.
    """

    title: str
    build: Build
    defaults: Parameters
    artifact: ArtifactKind | None = None
    headline: str | None = None


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
        defense = entry.build(config.parameters(), config, device)
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
        bundle_digest(config.artifact)
        return
    command = f"jobs/train_defense.py --kind {kind} --train SHARDS --output {config.artifact or 'DIR'}"
    if config.artifact is None:
        raise ArtifactError(f"{config.name} needs artifact: a {kind}, made by `{command}`")
    if not (Path(config.artifact) / "manifest.json").is_file():
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

    The artifact enters by its digest, not its path. Raises `ArtifactError` when it is missing.
    """
    check_artifact(config)
    content: dict[str, Any] = {
        "name": config.name,
        "seed": config.seed,
        "parameters": config.parameters(),
        "defenses_version": DEFENSES_VERSION,
    }
    kind = DEFENSES[config.name].artifact
    if config.artifact is not None:
        is_bundle = kind == "bundle"
        content["artifact"] = (bundle_digest if is_bundle else _digest_at)(config.artifact)
    if kind in ("bundle", "global_dictionary"):
        content["algorithm_version"] = ALGORITHM_VERSION
    return json.dumps(content, sort_keys=True)


def _digest_at(location: str) -> str:
    return artifact_digest(Path(location))


def _shown(key: str, value: Any) -> str:  # noqa: ANN401
    if key == "epsilon" and abs(value * 255 - round(value * 255)) < 1e-6:
        return f"{round(value * 255)}/255"
    number = f"{value:g}" if isinstance(value, float) else str(value)
    return f"lambda {number}" if key == "lmbda" else number


def with_strength(cbpdn: CbpdnConfig, lmbda: float | None) -> CbpdnConfig:
    """Return sparse coding with another lmbda, and rho scaled like sporco's rule 50 lmbda + 1.

    The ratio of the two is the threshold of an iteration; with rho left as it was, a fixed number of
    iterations would end far from the optimum for a lmbda far from the artifact's.
    """
    if lmbda is None or lmbda == cbpdn.lmbda:
        return cbpdn
    rho = None if cbpdn.rho is None else cbpdn.rho * (50 * lmbda + 1) / (50 * cbpdn.lmbda + 1)
    return CbpdnConfig(**{**cbpdn.model_dump(), "lmbda": lmbda, "rho": rho})


def _bundle(parameters: Parameters, config: DefenseConfig) -> Bundle:
    bundle = load_bundle(str(config.artifact))
    cbpdn = with_strength(bundle.config.cbpdn, parameters.get("lmbda"))
    return replace(bundle, config=bundle.config.model_copy(update={"cbpdn": cbpdn}))


def _purifier(parameters: Parameters, config: DefenseConfig, device: str) -> Purifier:
    return Purifier(_bundle(parameters, config), device)


# Some transforms load libraries that purification does without, so they are imported when asked for.


def _none(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    return Identity()


def _jpeg(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.compression import Jpeg

    return Jpeg(**parameters)


def _shield(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.compression import Shield

    return Shield()


def _median(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.smoothing import Median

    return Median(**parameters)


def _gaussian(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.smoothing import Gaussian

    return Gaussian(**parameters)


def _tvm(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.total_variation import TotalVariation

    return TotalVariation(**parameters)


def _tvm_dropout(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.total_variation import TotalVariationDropout

    return TotalVariationDropout(**parameters)


def _quilting(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.quilting import Quilting, load_patch_bank

    return Quilting(load_patch_bank(Path(str(config.artifact))), **parameters)


def _crop_ensemble(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.crops import CropEnsemble

    return CropEnsemble(**parameters)


def _pixel_deflection(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    from acsr_ray.defenses.deflection import PixelDeflection

    return PixelDeflection(**parameters)


def _magnet(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    return Magnet(load_autoencoder(Path(str(config.artifact)), device))


def _pixel_defend(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    return PixelDefend(load_pixel_cnn(Path(str(config.artifact)), device), **parameters)


def _stl(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    learnt = load_global_dictionary(Path(str(config.artifact)))
    cbpdn = with_strength(learnt.cbpdn, parameters["lmbda"])
    return DictionaryDefense(learnt.atoms, cbpdn, learnt.tikhonov, device)


def _acsr(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    return NearestCluster(_purifier(parameters, config, device), parameters["reselect"])


def _random_cluster(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    return RandomCluster(_purifier(parameters, config, device))


def _rank(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    return RankedCluster(_purifier(parameters, config, device), parameters["rank"])


def _cluster(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    return FixedCluster(_purifier(parameters, config, device), parameters["cluster"])


def _random_atoms(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    bundle = _bundle(parameters, config)
    count, channels, height, width = bundle.atoms.shape[1:]
    atoms = random_atoms((count, channels, height, width), config.seed)
    return DictionaryDefense(atoms, bundle.config.cbpdn, bundle.config.tikhonov, device)


def _dct_atoms(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    bundle = _bundle(parameters, config)
    atoms = dct_atoms(bundle.atoms.shape[1], bundle.atoms.shape[-1])
    return DictionaryDefense(atoms, bundle.config.cbpdn, bundle.config.tikhonov, device)


def _low_band(parameters: Parameters, config: DefenseConfig, device: str) -> Defense:
    return LowBand(_bundle(parameters, config).config.tikhonov)


LMBDA: Parameters = {"lmbda": None}
DEFENSES: Mapping[str, DefenseEntry] = {
    "none": DefenseEntry("No defense", _none, {}),
    "jpeg": DefenseEntry("JPEG", _jpeg, {"quality": 75, "subsampling": "4:2:0"}, headline="quality"),
    "shield": DefenseEntry("SHIELD", _shield, {}),
    "median": DefenseEntry("Median", _median, {"size": 3}, headline="size"),
    "gaussian": DefenseEntry("Gaussian", _gaussian, {"sigma": 0.5}, headline="sigma"),
    "tvm": DefenseEntry("TVM", _tvm, {"weight": 0.03}, headline="weight"),
    "tvm_dropout": DefenseEntry(
        "TVM dropout", _tvm_dropout, {"weight": 0.03, "keep": 0.5}, headline="weight"
    ),
    "quilting": DefenseEntry(
        "Quilting", _quilting, {"neighbours": 10, "overlap": 2, "seams": True}, "patch_bank", "neighbours"
    ),
    "crop_ensemble": DefenseEntry("Crop ensemble", _crop_ensemble, {"crops": 30, "crop": 0.4}, None, "crop"),
    "pixel_deflection": DefenseEntry(
        "Pixel deflection",
        _pixel_deflection,
        {"deflections": 100, "window": 10, "sigma": 0.04},
        headline="deflections",
    ),
    "magnet": DefenseEntry("MagNet", _magnet, {}, "magnet"),
    "pixel_defend": DefenseEntry("PixelDefend", _pixel_defend, {"epsilon": 16 / 255}, "pixel_cnn", "epsilon"),
    "stl": DefenseEntry("STL", _stl, LMBDA, "global_dictionary", "lmbda"),
    "acsr": DefenseEntry("ACSR", _acsr, {**LMBDA, "reselect": 0}, "bundle", "lmbda"),
    "random_atoms": DefenseEntry("Random atoms", _random_atoms, LMBDA, "bundle", "lmbda"),
    "dct_atoms": DefenseEntry("DCT atoms", _dct_atoms, LMBDA, "bundle", "lmbda"),
    "random_cluster": DefenseEntry("Random cluster", _random_cluster, LMBDA, "bundle", "lmbda"),
    "rank": DefenseEntry("Cluster of rank", _rank, {"rank": ..., **LMBDA}, "bundle", "rank"),
    "cluster": DefenseEntry("Cluster", _cluster, {"cluster": ..., **LMBDA}, "bundle", "cluster"),
    "low_band": DefenseEntry("Low band", _low_band, {}, "bundle"),
}
