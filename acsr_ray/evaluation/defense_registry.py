"""What the registry knows of every defence: title, builder, parameters with defaults, artifact."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from acsr_ray.defenses.base import Defense, Identity
from acsr_ray.defenses.compression import Jpeg, Shield
from acsr_ray.defenses.crops import CropEnsemble
from acsr_ray.defenses.quilting import Quilting, load_patch_bank
from acsr_ray.defenses.smoothing import Gaussian, Median
from acsr_ray.evaluation.cluster_defenses import (
    FixedCluster,
    NearestCluster,
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
from acsr_ray.purification.bundle import Bundle, load_bundle
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.training.global_dictionary import load_global_dictionary

ArtifactKind = Literal["magnet", "pixel_cnn", "global_dictionary", "patch_bank", "bundle"]


@dataclass(frozen=True)
class BuildRequest:
    """What a builder gets: all parameters, the artifact ("" where none is needed), seed and device."""

    parameters: Mapping[str, Any]
    artifact: str
    seed: int
    device: str


@dataclass(frozen=True)
class DefenseEntry:
    """One defence: title in tables, builder, parameters with defaults (`...` for required), artifact.

    `headline` is the parameter that a label always shows; `randomized` says whether it draws numbers. A
    default of None leaves the value to the artifact.
    """

    title: str
    build: Callable[[BuildRequest], Defense]
    defaults: Mapping[str, Any]
    artifact: ArtifactKind | None = None
    headline: str | None = None
    randomized: bool = False


def with_lmbda(cbpdn: CbpdnConfig, lmbda: float | None) -> CbpdnConfig:
    """Return sparse coding with another lmbda, see `CbpdnConfig.stronger`; None leaves it."""
    return cbpdn if lmbda in (None, cbpdn.lmbda) else cbpdn.stronger(lmbda / cbpdn.lmbda)


def _bundle(request: BuildRequest) -> Bundle:
    bundle = load_bundle(request.artifact)
    cbpdn = with_lmbda(bundle.config.cbpdn, request.parameters.get("lmbda"))
    return replace(bundle, config=bundle.config.model_copy(update={"cbpdn": cbpdn}))


def _purifier(request: BuildRequest) -> Purifier:
    """Return the purifier as asked for; what asks about clusters asks about the paper's reconstruction."""
    given = {"reconstruction": "cbpdn", **request.parameters}
    wanted = {k: v for k, v in given.items() if k in PurifyOptions.model_fields and v is not None}
    options = PurifyOptions.model_validate(wanted)
    return Purifier(_bundle(request), request.device, options)


def _tvm(request: BuildRequest) -> Defense:
    # Here and below: scikit-image is not installed where images are only purified.
    from acsr_ray.defenses.total_variation import TotalVariation

    return TotalVariation(**request.parameters)


def _tvm_dropout(request: BuildRequest) -> Defense:
    from acsr_ray.defenses.total_variation import TotalVariationDropout

    return TotalVariationDropout(**request.parameters)


def _pixel_deflection(request: BuildRequest) -> Defense:
    from acsr_ray.defenses.deflection import PixelDeflection

    return PixelDeflection(**request.parameters)


def _quilting(request: BuildRequest) -> Defense:
    return Quilting(load_patch_bank(Path(request.artifact)), **request.parameters)


def _magnet(request: BuildRequest) -> Defense:
    return Magnet(load_autoencoder(Path(request.artifact), request.device))


def _pixel_defend(request: BuildRequest) -> Defense:
    return PixelDefend(load_pixel_cnn(Path(request.artifact), request.device), **request.parameters)


def _stl(request: BuildRequest) -> Defense:
    learnt = load_global_dictionary(Path(request.artifact))
    cbpdn = with_lmbda(learnt.cbpdn, request.parameters["lmbda"])
    return DictionaryDefense(learnt.atoms, cbpdn, learnt.tikhonov, request.device)


def _acsr(request: BuildRequest) -> Defense:
    purifier = _purifier(request)
    if purifier.unrolled is not None and request.parameters["lmbda"] is not None:
        raise ValueError("lmbda does nothing to an unrolled reconstruction; its factor is strength")
    if request.parameters["reselect"] and not purifier.uses_clusters:
        raise ValueError("reselect does nothing where all clusters share an unrolled reconstruction")
    return NearestCluster(purifier, request.parameters["reselect"])


def _random_cluster(request: BuildRequest) -> Defense:
    return RandomCluster(_purifier(request))


def _rank(request: BuildRequest) -> Defense:
    return RankedCluster(_purifier(request), request.parameters["rank"])


def _cluster(request: BuildRequest) -> Defense:
    return FixedCluster(_purifier(request), request.parameters["cluster"])


def _random_atoms(request: BuildRequest) -> Defense:
    bundle = _bundle(request)
    count, channels, height, width = bundle.atoms.shape[1:]
    atoms = random_atoms((count, channels, height, width), request.seed)
    return DictionaryDefense(atoms, bundle.config.cbpdn, bundle.config.tikhonov, request.device)


def _dct_atoms(request: BuildRequest) -> Defense:
    bundle = _bundle(request)
    atoms = dct_atoms(bundle.atoms.shape[1], bundle.atoms.shape[-1])
    return DictionaryDefense(atoms, bundle.config.cbpdn, bundle.config.tikhonov, request.device)


def _low_band(request: BuildRequest) -> Defense:
    return LowBand(_bundle(request).config.tikhonov)


LMBDA: Mapping[str, Any] = {"lmbda": None}
OPTIONS: Mapping[str, Any] = PurifyOptions().model_dump()
DEFENSES: Mapping[str, DefenseEntry] = {
    "none": DefenseEntry("No defense", lambda request: Identity(), {}),
    "jpeg": DefenseEntry(
        "JPEG",
        lambda request: Jpeg(**request.parameters),
        {"quality": 75, "subsampling": "4:2:0"},
        headline="quality",
    ),
    "shield": DefenseEntry("SHIELD", lambda request: Shield(), {}, randomized=True),
    "median": DefenseEntry(
        "Median", lambda request: Median(**request.parameters), {"size": 3}, headline="size"
    ),
    "gaussian": DefenseEntry(
        "Gaussian", lambda request: Gaussian(**request.parameters), {"sigma": 0.5}, headline="sigma"
    ),
    "tvm": DefenseEntry("TVM", _tvm, {"weight": 0.03}, headline="weight"),
    "tvm_dropout": DefenseEntry(
        "TVM dropout", _tvm_dropout, {"weight": 0.03, "keep": 0.5}, headline="weight", randomized=True
    ),
    "quilting": DefenseEntry(
        "Quilting",
        _quilting,
        {"neighbours": 10, "overlap": 2, "seams": True},
        "patch_bank",
        "neighbours",
        randomized=True,
    ),
    "crop_ensemble": DefenseEntry(
        "Crop ensemble",
        lambda request: CropEnsemble(**request.parameters),
        {"crops": 30, "crop": 0.4},
        None,
        "crop",
        randomized=True,
    ),
    "pixel_deflection": DefenseEntry(
        "Pixel deflection",
        _pixel_deflection,
        {"deflections": 100, "window": 10, "sigma": 0.04},
        headline="deflections",
        randomized=True,
    ),
    "magnet": DefenseEntry("MagNet", _magnet, {}, "magnet"),
    "pixel_defend": DefenseEntry("PixelDefend", _pixel_defend, {"epsilon": 16 / 255}, "pixel_cnn", "epsilon"),
    "stl": DefenseEntry("STL", _stl, LMBDA, "global_dictionary", "lmbda"),
    "acsr": DefenseEntry("ACSR", _acsr, {**LMBDA, **OPTIONS, "reselect": 0}, "bundle", "lmbda"),
    "random_atoms": DefenseEntry("Random atoms", _random_atoms, LMBDA, "bundle", "lmbda"),
    "dct_atoms": DefenseEntry("DCT atoms", _dct_atoms, LMBDA, "bundle", "lmbda"),
    "random_cluster": DefenseEntry(
        "Random cluster", _random_cluster, LMBDA, "bundle", "lmbda", randomized=True
    ),
    "rank": DefenseEntry("Cluster of rank", _rank, {"rank": ..., **LMBDA}, "bundle", "rank"),
    "cluster": DefenseEntry("Cluster", _cluster, {"cluster": ..., **LMBDA}, "bundle", "cluster"),
    "low_band": DefenseEntry("Low band", _low_band, {}, "bundle"),
}
