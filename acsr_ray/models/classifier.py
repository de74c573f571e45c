"""Trained WideResNets as artifacts (`baseline/`, `robust/`) and inference in fixed-shape micro-batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acsr_ray.artifacts import (
    ArtifactError,
    load_artifact,
    load_tensors,
    save_tensor_artifact,
)
from acsr_ray.config import Described
from acsr_ray.models.wide_resnet import WideResNet, build_wide_resnet

WEIGHTS = "weights.safetensors"

ENCODER_MICRO_BATCH = {"cpu": 32, "cuda": 256}
"""Images per encoder call. Fixed, because matrix products differ in the last bit between batch sizes."""


class EncoderConfig(Described):
    """What it takes to rebuild an encoder and feed it."""

    architecture: str
    """`wrn-DEPTH-WIDTH[-sSTRIDE][-gn]`, see `build_wide_resnet`."""
    num_classes: int
    """J."""
    image_size: int
    """Side in pixels of the square the encoder sees; other sizes are resized to it."""
    resize: str = "bilinear-antialias"
    """How a copy of the image is brought to `image_size`."""


@dataclass(frozen=True)
class Classifier:
    """A trained WideResNet in evaluation mode with its configuration and class names."""

    model: WideResNet
    config: EncoderConfig
    class_names: tuple[str, ...]
    manifest: Mapping[str, Any]


def save_classifier(
    directory: Path,
    kind: str,
    model: WideResNet,
    config: EncoderConfig,
    class_names: tuple[str, ...],
    content: Mapping[str, Any],
) -> None:
    """Write a trained network as artifact `kind` (`baseline` or `robust`) with extra manifest content."""
    description = {"encoder": config.describe(), "class_names": list(class_names), **content}
    save_tensor_artifact(directory, kind, WEIGHTS, model.state_dict(), description)


def load_classifier(directory: Path, kind: str, device: str = "cpu") -> Classifier:
    """Load a network saved by `save_classifier`; `ArtifactError` when it is not one."""
    manifest = load_artifact(directory, kind)
    config = EncoderConfig.from_description(manifest["encoder"])
    model = restore_encoder(config, load_tensors(directory / WEIGHTS), device)
    return Classifier(model, config, tuple(manifest["class_names"]), manifest)


def restore_encoder(config: EncoderConfig, weights: Mapping[str, Tensor], device: str = "cpu") -> WideResNet:
    """Build the network, load its weights and freeze it in evaluation mode on a device."""
    model = build_wide_resnet(config.architecture, config.num_classes)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ArtifactError(f"weights do not fit {config.architecture}: {error}") from error
    return model.requires_grad_(False).eval().to(device)


def encode(model: WideResNet, images: Tensor, image_size: int) -> Tensor:
    """Return latents (N, L) of images (N, 3, H, W), the same for an image whatever its neighbours.

    A copy resized to `image_size` is encoded. The model always sees `ENCODER_MICRO_BATCH` images; the last
    call is padded with zeros.
    """
    images = fit_to(images, image_size)
    size = ENCODER_MICRO_BATCH[images.device.type]
    latents = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        # Contiguous, because the memory layout chooses the kernel, and filling up changes the layout.
        padded = pad_batch(part, size).contiguous()
        latents.append(model.latent(padded)[: len(part)])
    return torch.cat(latents) if latents else images.new_zeros((0, model.latent_length))


def fit_to(images: Tensor, size: int) -> Tensor:
    """Return images (N, C, H, W) as (N, C, size, size), the same for an image whatever its neighbours.

    Bilinear with antialiasing; images of that size are returned as they are.
    """
    if images.shape[-2:] == (size, size) or not len(images):
        return images
    return torch.cat([_resize(image, size) for image in images.split(1)])


def _resize(image: Tensor, size: int) -> Tensor:
    return F.interpolate(image, (size, size), mode="bilinear", antialias=True)


def pad_batch(images: Tensor, size: int) -> Tensor:
    """Append zero images until there are `size`."""
    missing = size - len(images)
    return torch.cat([images, images.new_zeros((missing, *images.shape[1:]))]) if missing else images
