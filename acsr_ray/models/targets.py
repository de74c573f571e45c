"""Target classifiers: the networks that a corpus is purified for and that attackers attack.

A target is an artifact of `train_target`, or any model of the user's: a factory `package.module:function`,
a TorchScript file, or a safetensors file of one of the architectures here. Its own normalisation is a layer
in front of it, so every target takes images (N, 3, H, W) in [0, 1] and gives logits (N, J).
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.artifacts import (
    ArtifactError,
    artifact_digest,
    artifact_kind,
    file_digest,
    json_digest,
    load_artifact,
    load_tensors,
    save_tensor_artifact,
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
MINIMUM_SIDE: Mapping[str, int] = {"alexnet": 4, "vgg16": 32}
"""Side in pixels behind the first convolution below which nothing is left to pool."""
CLASS_LAYER = "fc."
"""The layer that depends on the number of classes; it is called so in every network of ours."""
PROBE_SIDES = (32, 64, 224)
"""Sides in pixels of the images that a user's model is asked about, to tell it from others."""
DEFAULT_MEAN = (0.5, 0.5, 0.5)
DEFAULT_STD = (0.25, 0.25, 0.25)

Channels = tuple[float, float, float]
PositiveChannels = tuple[
    Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
]


class TargetError(AcsrError, ValueError):
    """A target that cannot be built or loaded; the message says which and why."""


class TargetConfig(Described):
    """What it takes to build a target of ours and feed it."""

    architecture: str = "vgg16"
    """`alexnet`, `vgg16`, `resnet9`, `resnet50`, `googlenet`, `small_cnn` or `wrn-DEPTH-WIDTH`."""
    num_classes: int = Field(10, ge=2)
    """J."""
    width: float = Field(1.0, gt=0)
    """Factor on every channel count; not for `wrn`, whose name holds it, nor for `small_cnn`."""
    image_size: int = Field(32, ge=8)
    """Side in pixels of the square images it was trained on; `small_cnn` takes 32 only."""
    stem_stride: int = Field(1, ge=1)
    """Stride of the first convolution; 2 quarters the cost for images of 64 pixels and more."""
    mean: Channels = DEFAULT_MEAN
    """Per channel, subtracted from images in [0, 1]; `wrn` and `small_cnn` bring their own."""
    std: PositiveChannels = DEFAULT_STD
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
    """A classifier in evaluation mode, images (N, 3, H, W) in [0, 1] to logits (N, J).

    `digest` names what it computes; `class_names` is () and `image_size` None where the source says nothing.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    digest: str
    image_size: int | None


def build_target(config: TargetConfig) -> nn.Module:
    """Return an untrained network that takes images in [0, 1].

    Raises:
        TargetError: unknown architecture, an image of a size it cannot take, or an option it does not have.
    """
    name = config.architecture
    if name == "small_cnn" or name.startswith("wrn-"):
        return _build_plain(config)
    if name not in NETWORKS:
        known = [*NETWORKS, "small_cnn", "wrn-16-2"]
        raise TargetError(f"unknown architecture {name!r}{did_you_mean(name, known)}")
    least = MINIMUM_SIDE.get(name, 1)
    if -(-config.image_size // config.stem_stride) < least:
        side = (least - 1) * config.stem_stride + 1
        raise TargetError(
            f"{name} with stem_stride {config.stem_stride} needs images of at least {side} pixels a side, "
            f"got {config.image_size}"
        )
    network = NETWORKS[name](config.num_classes, config.width, config.stem_stride)
    return Normalized(network, config.mean, config.std)


def _build_plain(config: TargetConfig) -> nn.Module:
    # Both bring their own normalisation, so an option that would be ignored is refused.
    standard = {"width": 1.0, "stem_stride": 1, "mean": DEFAULT_MEAN, "std": DEFAULT_STD}
    for option, value in standard.items():
        if getattr(config, option) != value:
            raise TargetError(f"{config.architecture} has no option {option}")
    if config.architecture == "small_cnn":
        if config.image_size != 32:
            raise TargetError(f"small_cnn takes images of 32 pixels a side, got {config.image_size}")
        return SmallCnn(config.num_classes)
    try:
        return build_wide_resnet(config.architecture, config.num_classes)
    except ValueError as error:
        raise TargetError(str(error)) from error


def save_target(
    directory: Path,
    model: nn.Module,
    config: TargetConfig,
    class_names: tuple[str, ...],
    content: Mapping[str, Any],
) -> None:
    """Write a trained target as artifact `target` with extra manifest content."""
    description = {"target": config.describe(), "class_names": list(class_names), **content}
    save_tensor_artifact(directory, "target", WEIGHTS, model.state_dict(), description)


def load_target(location: str, device: str = "cpu", config: TargetConfig | None = None) -> Target:
    """Load a target by artifact directory, `package.module:factory`, TorchScript or safetensors file.

    Args:
        location: an artifact of `train_target`, `train_baseline` or `train_robust`; a factory of no
            arguments, in an importable module, that returns a `torch.nn.Module` taking images in [0, 1]; a
            `.pt`, `.ts` or `.torchscript` file; or a `.safetensors` file.
        device: where to put it.
        config: architecture of a safetensors file, and normalisation of both kinds of file. A TorchScript
            model without a config is taken to hold its own normalisation.

    Raises:
        TargetError: nothing loadable there.
        ArtifactError: an artifact of another kind or whose bytes changed, or weights that do not fit.
    """
    path = Path(location)
    if path.is_dir():
        target = _channels_last(_from_artifact(path))
    elif path.suffix in FILE_LOADERS:
        if not path.is_file():
            raise TargetError(f"no target {location!r}: the file does not exist")
        target = FILE_LOADERS[path.suffix](path, config)
    elif ":" in location:
        target = _from_factory(location)
    else:
        raise TargetError(
            f"no target {location!r}: neither a directory of train_target, nor package.module:factory, nor a "
            ".pt (TorchScript) or .safetensors file"
        )
    # Not Module.requires_grad_, which TorchScript modules lack.
    for parameter in target.model.parameters():
        parameter.requires_grad_(False)
    return replace(target, model=target.model.eval().to(device))


def _channels_last(target: Target) -> Target:
    """Lay our own networks' weights out as oneDNN and cuDNN like them: gradients cost as little as half.

    A user's network stays as it is: one that calls `view` on its feature maps would fail.
    """
    model = target.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return replace(target, model=model)


def absolute_location(location: str) -> str:
    """Return a target's location as workers in other folders find it: paths that exist become absolute."""
    path = Path(location)
    return str(path.resolve()) if path.exists() else location


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
    return Target(model, (), _file_target_digest(path, config), config.image_size)


def _load_all(model: nn.Module, weights: Mapping[str, Tensor], origin: Path) -> None:
    try:
        model.load_state_dict({name: tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ArtifactError(f"weights of {origin} do not fit: {error}") from error


def _from_torchscript(path: Path, config: TargetConfig | None) -> Target:
    try:
        script = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise TargetError(
            f"{path} is not a readable TorchScript file (a state dict belongs in .safetensors): {error}"
        ) from error
    model = script if config is None else Normalized(script, config.mean, config.std)
    return Target(model, (), _file_target_digest(path, config), config.image_size if config else None)


def _file_target_digest(path: Path, config: TargetConfig | None) -> str:
    """Return what names a file's function: its bytes, and what is put around them."""
    return json_digest([file_digest(path), config.describe() if config else None])


FILE_LOADERS: Mapping[str, Callable[[Path, TargetConfig | None], Target]] = {
    ".safetensors": _from_safetensors,
    ".pt": _from_torchscript,
    ".ts": _from_torchscript,
    ".torchscript": _from_torchscript,
}


def _from_factory(location: str) -> Target:
    module_name, _, function = location.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    # ValueError and TypeError: an empty or a relative module name.
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise TargetError(f"cannot import target {location!r}: {error}") from error
    if not callable(factory):
        raise TargetError(f"{location} is a {type(factory).__name__}, not a function that makes a target")
    model = factory()
    if not isinstance(model, nn.Module):
        raise TargetError(f"{location} returned {type(model).__name__}, not a torch.nn.Module")
    return Target(model, (), _module_digest(location, model), None)


def _module_digest(location: str, model: nn.Module) -> str:
    """Return a digest of a factory's name, of every parameter and buffer, and of its answers to a probe.

    The answers tell what no tensor does, a normalisation in plain numbers, say. Two digits of each logit
    are the same on every machine, all but always.
    """
    digest = hashlib.sha256(location.encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, because NumPy has no bfloat16.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(_probe(model)).encode())
    return digest.hexdigest()


def _probe(model: nn.Module) -> list[str]:
    """Return a model's logits for one image of usual sizes, roughly; a size it refuses gives none."""
    answers = []
    model.eval()
    for side in PROBE_SIDES:
        image = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                logits = model(image)
        except (RuntimeError, ValueError):
            continue
        answers.append(" ".join(f"{value:.2g}" for value in logits.flatten().tolist()))
    return answers
