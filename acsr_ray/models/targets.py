"""Target classifiers: the networks that a corpus is purified for and that attackers attack.

A target is an artifact of `train_target`, or any model of the user's: a factory `package.module:function`,
a TorchScript file, or a safetensors file of one of the architectures here. Its own normalisation is a layer
in front of it, so every target takes images (N, 3, H, W) in [0, 1] and gives logits (N, J).
"""

import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.artifacts import (
    ArtifactError,
    artifact_digest,
    artifact_kind,
    begin_artifact,
    file_digest,
    finish_artifact,
    load_artifact,
    load_tensors,
    save_tensors,
)
from acsr_ray.config import AcsrError, Described, did_you_mean
from acsr_ray.models.alexnet import AlexNet
from acsr_ray.models.classifier import load_classifier
from acsr_ray.models.googlenet import GoogLeNet
from acsr_ray.models.resnet import ResNet50
from acsr_ray.models.resnet9 import ResNet9
from acsr_ray.models.small_cnn import SmallCnn
from acsr_ray.models.vgg import Vgg16
from acsr_ray.models.wide_resnet import build_wide_resnet

WEIGHTS = "weights.safetensors"
NETWORKS: Mapping[str, Callable[[int, float, int], nn.Module]] = {
    "alexnet": AlexNet,
    "vgg16": Vgg16,
    "resnet9": ResNet9,
    "resnet50": ResNet50,
    "googlenet": GoogLeNet,
}
CLASS_LAYER = "fc."
"""The layer that depends on the number of classes; it is called so in every network of ours."""


class TargetError(AcsrError, ValueError):
    """A target that cannot be built or loaded; the message says which and why."""


class TargetConfig(Described):
    """What it takes to build a target of ours and feed it."""

    architecture: str = "vgg16"
    """`alexnet`, `vgg16`, `resnet9`, `resnet50`, `googlenet`, `small_cnn` or `wrn-DEPTH-WIDTH`."""
    num_classes: int = Field(10, ge=2)
    """J."""
    width: float = Field(1.0, gt=0)
    """Factor on every channel count (not for wrn, whose name holds it)."""
    image_size: int = Field(32, ge=8)
    """Side in pixels of the square images it was trained on."""
    stem_stride: int = Field(1, ge=1)
    """Stride of the first convolution; 2 quarters the cost for images of 64 pixels and more."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, subtracted from images in [0, 1]."""
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    """Per channel, divides."""


class Normalized(nn.Module):
    """A network behind its normalisation: (x - mean) / std of images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of images (N, 3, H, W) in [0, 1]."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class Target:
    """A classifier in evaluation mode; `digest` names its weights, `num_classes` is None if unknown."""

    model: nn.Module
    class_names: tuple[str, ...]
    digest: str
    image_size: int | None


def build_target(config: TargetConfig) -> nn.Module:
    """Return an untrained network that takes images in [0, 1].

    Raises:
        TargetError: unknown architecture, or an image too small for it.
    """
    name = config.architecture
    if name.startswith("wrn-"):
        # It brings its own normalisation, the same for every model of the pipeline.
        try:
            return build_wide_resnet(name, config.num_classes)
        except ValueError as error:
            raise TargetError(str(error)) from error
    if name == "small_cnn":
        return SmallCnn(config.num_classes)
    if name not in NETWORKS:
        known = [*NETWORKS, "small_cnn", "wrn-16-2"]
        raise TargetError(f"unknown architecture {name!r}{did_you_mean(name, known)}")
    if config.image_size < 32 * config.stem_stride and name == "vgg16":
        raise TargetError(f"vgg16 needs images of at least {32 * config.stem_stride} pixels a side")
    network = NETWORKS[name](config.num_classes, config.width, config.stem_stride)
    return Normalized(network, config.mean, config.std)


def save_target(
    directory: Path,
    model: nn.Module,
    config: TargetConfig,
    class_names: tuple[str, ...],
    content: Mapping[str, Any],
) -> None:
    """Write a trained target as artifact `target` with extra manifest content."""
    begin_artifact(directory)
    save_tensors(directory / WEIGHTS, model.state_dict())
    description = {"target": config.describe(), "class_names": list(class_names), **content}
    finish_artifact(directory, "target", [WEIGHTS], description)


def load_target(location: str, device: str = "cpu", config: TargetConfig | None = None) -> Target:
    """Load a target by artifact directory, `package.module:factory`, TorchScript or safetensors file.

    Args:
        location: an artifact of `train_target`, `train_baseline` or `train_robust`; a factory of no
            arguments that returns a module taking images in [0, 1]; a `.pt` or `.ts` TorchScript file; or a
            `.safetensors` file.
        device: where to put it.
        config: architecture of a safetensors file, and normalisation of both kinds of file. A TorchScript
            model without a config is taken to hold its own normalisation.

    Raises:
        TargetError: nothing loadable there.
        ArtifactError: an artifact whose bytes changed.
    """
    path = Path(location)
    if path.is_dir():
        target = _from_artifact(path)
    elif path.suffix == ".safetensors":
        target = _from_safetensors(path, config)
    elif path.suffix in (".pt", ".ts", ".torchscript"):
        target = _from_torchscript(path, config)
    elif ":" in location:
        target = _from_factory(location)
    else:
        raise TargetError(
            f"no target {location!r}: neither a directory of train_target, nor package.module:factory, nor a "
            ".pt (TorchScript) or .safetensors file"
        )
    model = target.model.requires_grad_(False).eval().to(device)
    return Target(model, target.class_names, target.digest, target.image_size)


def initialize_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load pretrained weights into a network in place, for transfer learning.

    The class layer stays as it is when the number of classes differs; everything else must fit.

    Returns:
        Names of the tensors that were left at their initial values.

    Raises:
        TargetError: another architecture or width.
    """
    own = model.state_dict()
    usable = {name: tensor for name, tensor in weights.items() if _fits(own, name, tensor)}
    skipped = sorted(own.keys() - usable.keys())
    foreign = sorted(weights.keys() - own.keys())
    misfit = [name for name in skipped if CLASS_LAYER not in name]
    if misfit or foreign:
        examples = ", ".join((misfit + foreign)[:3])
        raise TargetError(f"weights are of another architecture or width; first differences: {examples}")
    model.load_state_dict({**own, **usable})
    return skipped


def _fits(own: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    return name in own and own[name].shape == tensor.shape


def _from_artifact(directory: Path) -> Target:
    for kind in ("baseline", "robust"):
        if artifact_kind(directory) == kind:
            encoder = load_classifier(directory, kind)
            digest = artifact_digest(directory)
            return Target(encoder.model, encoder.class_names, digest, encoder.config.image_size)
    manifest = load_artifact(directory, "target")
    config = TargetConfig.from_description(manifest["target"])
    model = build_target(config)
    _load_all(model, load_tensors(directory / WEIGHTS), directory)
    return Target(model, tuple(manifest["class_names"]), artifact_digest(directory), config.image_size)


def _from_safetensors(path: Path, config: TargetConfig | None) -> Target:
    if config is None:
        raise TargetError(f"{path} needs its architecture: give architecture, num_classes and width")
    model = build_target(config)
    weights = load_tensors(path)
    if not any(name.startswith("network.") for name in weights) and isinstance(model, Normalized):
        weights = {f"network.{name}": tensor for name, tensor in weights.items()}
    _load_all(model, weights, path)
    return Target(model, (), file_digest(path), config.image_size)


def _load_all(model: nn.Module, weights: Mapping[str, Tensor], origin: Path) -> None:
    try:
        model.load_state_dict({name: tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ArtifactError(f"weights of {origin} do not fit: {error}") from error


def _from_torchscript(path: Path, config: TargetConfig | None) -> Target:
    try:
        script = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise TargetError(f"{path} is not a readable TorchScript file: {error}") from error
    model = script if config is None else Normalized(script, config.mean, config.std)
    return Target(model, (), file_digest(path), config.image_size if config else None)


def _from_factory(location: str) -> Target:
    module_name, _, function = location.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise TargetError(f"cannot import target {location!r}: {error}") from error
    model = factory()
    if not isinstance(model, nn.Module):
        raise TargetError(f"{location} returned {type(model).__name__}, not a torch.nn.Module")
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return Target(model, (), digest.hexdigest(), None)
