"""The bundle: encoder, Gaussians and dictionaries that purification needs, as one verified directory.

Layout: `manifest.json` (settings, class names, digests), `encoder.safetensors`, `clusters.safetensors`
(whitening packed as its lower triangle), `dictionaries.safetensors`, and `reconstruction.safetensors` where
an unrolled reconstruction was trained. Shapes: K clusters, M atoms, C = 3 channels, h x w support, L latent
length.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from acsr_ray.artifacts import (
    ArtifactError,
    artifact_digest,
    begin_artifact,
    finish_artifact,
    load_artifact,
    load_tensors,
    save_tensors,
)
from acsr_ray.clustering.gaussians import Gaussians
from acsr_ray.clustering.selection import SelectionRule
from acsr_ray.config import Described
from acsr_ray.models.classifier import EncoderConfig
from acsr_ray.purification.options import PurifyOptions, Reconstruction, Strength
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.tikhonov import TikhonovConfig
from acsr_ray.sparse.unrolled import UnrolledConfig

DEFAULT_BUNDLE = "cifar10-small"
ALIASES = {"cifar10": "cifar10-small", "imagenet10-64": "imagenet10-small"}
"""Other names of packaged bundles: what a data set is best served with today, whatever that is called."""
ALGORITHM_VERSION = 4
"""Raised when the same bundle and input would give other pixels."""

ENCODER = "encoder.safetensors"
CLUSTERS = "clusters.safetensors"
DICTIONARIES = "dictionaries.safetensors"
RECONSTRUCTION = "reconstruction.safetensors"


class AutoStrength(Described):
    """Strength of `auto` for an image: 1 at a reference level, growing with the level, within bounds.

    s = clip(1 + slope (level / reference - 1), low, high)
    """

    reference: float = Field(0.018, gt=0)
    """Level where the strength is 1. The default is the median noise level of clean images of CIFAR-10, on
    the [0, 1] pixel scale; `train_purifier` records those of its validation images."""
    slope: float = Field(0.5, ge=0)
    """Change of the strength when the level changes by the reference."""
    low: float = Field(0.5, gt=0)
    """Smallest strength."""
    high: float = Field(2.0, gt=0)
    """Largest strength."""

    def of(self, level: Tensor) -> Tensor:
        """Return the strength (N,) at levels (N,)."""
        return (1 + self.slope * (level / self.reference - 1)).clamp(self.low, self.high)


class BundleConfig(Described):
    """Every setting that decides the pixels a bundle produces."""

    name: str
    """What people call it."""
    class_names: tuple[str, ...] = Field(min_length=1)
    """Names of the classes, in the order of their ids."""
    encoder: EncoderConfig
    """Architecture and input of the robust encoder."""
    selection: SelectionRule = "mahalanobis"
    """How the cluster is chosen."""
    tikhonov: TikhonovConfig = TikhonovConfig()
    """Split into low and high band."""
    cbpdn: CbpdnConfig = CbpdnConfig()
    """Sparse coding of the high band."""
    reconstruction: Reconstruction = "cbpdn"
    """What purifies unless another is asked for: `cbpdn`, the paper's, or `unrolled`, trained on attacks."""
    unrolled: UnrolledConfig | None = None
    """The unrolled network; None where none was trained."""
    auto_strength: AutoStrength = AutoStrength()
    """What strength `auto` is, by the image's noise level (see `acsr_ray.sparse.noise`)."""
    auto_by_response: AutoStrength | None = None
    """What it is where the network is in use, by the network's response to its own output (see
    `acsr_ray.purification.response`). None: as for sparse coding."""
    unrolled_strength: Strength = 1.0
    """Strength of the network unless another is asked for."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reconstruction == "unrolled" and self.unrolled is None:
            raise ValueError("this bundle has no unrolled reconstruction; jobs/train_purifier.py trains one")
        return self

    def with_reconstruction(self, reconstruction: Reconstruction | None) -> Self:
        """Return the settings with another reconstruction; None leaves the bundle's own.

        Raises:
            ArtifactError: it was not trained.
        """
        if reconstruction is None or reconstruction == self.reconstruction:
            return self
        if reconstruction == "unrolled" and self.unrolled is None:
            raise ArtifactError(f"bundle {self.name} has no unrolled reconstruction; jobs/train_purifier.py")
        return self.model_copy(update={"reconstruction": reconstruction})

    @property
    def strength(self) -> Strength:
        """Strength unless another is asked for."""
        return self.unrolled_strength if self.reconstruction == "unrolled" else 1.0

    def resolve(self, options: PurifyOptions) -> PurifyOptions:
        """Return the options with the bundle's own ways by name, where none was asked for.

        Raises:
            ArtifactError: the reconstruction was not trained.
        """
        own = self.with_reconstruction(options.reconstruction)
        strength = own.strength if options.strength is None else options.strength
        named = {"reconstruction": own.reconstruction, "strength": strength}
        return PurifyOptions.model_validate(options.model_dump() | named)

    def changed(self, options: PurifyOptions) -> dict[str, Any]:
        """Return the options that are not the bundle's own, as JSON: what a run's identity depends on.

        The bundle's own way is the same by name as without it.

        Raises:
            ArtifactError: the reconstruction was not trained.
        """
        wanted = self.resolve(options)
        usual = self.resolve(PurifyOptions(reconstruction=wanted.reconstruction))
        own = {name for name, value in usual if getattr(wanted, name) == value} - {"reconstruction"}
        if wanted.reconstruction == self.reconstruction:
            own.add("reconstruction")
        return wanted.model_dump(mode="json", exclude=own)


@dataclass(frozen=True)
class Bundle:
    """Everything purification needs; `atoms` is (K, M, 3, h, w), one dictionary per Gaussian.

    `reconstruction` holds the weights of the unrolled network, {} where there is none.
    """

    config: BundleConfig
    encoder: Mapping[str, Tensor]
    gaussians: Gaussians
    atoms: Tensor
    reconstruction: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, latent = self.gaussians.mean.shape
        if self.atoms.ndim != 5 or len(self.atoms) != count or self.atoms.shape[2] != 3:
            raise ArtifactError(f"dictionaries must be ({count}, M, 3, h, w), got {tuple(self.atoms.shape)}")
        if self.gaussians.whitening.shape != (count, latent, latent):
            raise ArtifactError(f"whitening must be ({count}, {latent}, {latent})")
        learnt = {
            "encoder": self.encoder,
            "clusters": {"mean": self.gaussians.mean, "whitening": self.gaussians.whitening},
        }
        for part, tensors in learnt.items():
            if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise ArtifactError(f"the bundle's {part} are not all finite: it can purify nothing")
        if (self.config.unrolled is None) != (not self.reconstruction):
            raise ArtifactError("an unrolled reconstruction needs both its settings and its weights")

    def with_reconstruction(self, reconstruction: Reconstruction | None) -> "Bundle":
        """Return the bundle with another reconstruction; see `BundleConfig.with_reconstruction`."""
        return replace(self, config=self.config.with_reconstruction(reconstruction))

    def renamed(self, name: str) -> "Bundle":
        """Return the bundle under another name."""
        return replace(self, config=self.config.model_copy(update={"name": name}))


def save_bundle(directory: Path, bundle: Bundle, content: Mapping[str, Any], *, half: bool = False) -> None:
    """Write a bundle.

    Args:
        directory: where; an older bundle there is withdrawn first.
        bundle: what to write.
        content: provenance for the manifest (training data digest, metrics).
        half: weights and whitening in half precision; they are computed with in single precision.
    """
    begin_artifact(directory)
    save_tensors(directory / ENCODER, _stored(bundle.encoder, half))
    save_tensors(directory / CLUSTERS, bundle.gaussians.pack(half=half))
    save_tensors(directory / DICTIONARIES, {"atoms": bundle.atoms.float()})
    files = [ENCODER, CLUSTERS, DICTIONARIES]
    if bundle.reconstruction:
        save_tensors(directory / RECONSTRUCTION, _stored(bundle.reconstruction, half))
        files.append(RECONSTRUCTION)
    manifest = {
        "algorithm_version": ALGORITHM_VERSION,
        "bundle": bundle.config.describe(),
        **content,
    }
    finish_artifact(directory, "bundle", files, manifest)


def _stored(weights: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    return {
        name: tensor.half() if half and tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def load_bundle(location: str | Path) -> Bundle:
    """Load a bundle by directory or by the name of one that ships with the package.

    Raises:
        ArtifactError: no such bundle, or its files do not match its manifest.
    """
    directory = find_bundle(location)
    manifest = load_artifact(directory, "bundle")
    try:
        config = BundleConfig.from_description(manifest["bundle"])
    except (KeyError, ValidationError) as error:
        raise ArtifactError(f"{directory} has no usable bundle settings: {error}") from error
    learnt = {RECONSTRUCTION} if config.unrolled is not None else set()
    missing = ({ENCODER, CLUSTERS, DICTIONARIES} | learnt) - manifest["files"].keys()
    if missing:
        raise ArtifactError(f"{directory} has no digest of {', '.join(sorted(missing))}")
    try:
        gaussians = Gaussians.unpack(load_tensors(directory / CLUSTERS))
        atoms = load_tensors(directory / DICTIONARIES)["atoms"].float()
    except KeyError as error:
        raise ArtifactError(f"{directory} has no usable tensors: {error} is missing") from error
    weights = load_tensors(directory / RECONSTRUCTION) if learnt else {}
    weights = {name: tensor.float() for name, tensor in weights.items()}
    return Bundle(config, load_tensors(directory / ENCODER), gaussians, atoms, weights)


def find_bundle(location: str | Path) -> Path:
    """Return the directory of a bundle given by path, or by name or alias of a packaged one."""
    path = Path(location)
    if path.is_dir():
        return path.resolve()
    packaged = Path(str(files("acsr_ray") / "bundles"))
    names = sorted(entry.parent.name for entry in packaged.glob("*/manifest.json"))
    name = ALIASES.get(str(location), str(location))
    if name in names:
        return packaged / name
    raise ArtifactError(
        f"no bundle {str(location)!r}: not a directory, and packaged are {', '.join(names) or 'none'}"
    )


def bundle_digest(location: str | Path) -> str:
    """Return the digest that a run records for its bundle."""
    return artifact_digest(find_bundle(location))
