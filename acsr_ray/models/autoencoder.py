"""The denoising autoencoder of MagNet: a few convolutions at full size, saved as artifact `magnet`.

Source: Meng and Chen 2017, MagNet, whose reformer moves an image towards the manifold of clean ones. Theirs
for CIFAR-10 is as shallow; width and rectifiers are chosen here so that clean images survive.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from torch import Tensor, nn

from acsr_ray.artifacts import (
    ArtifactError,
    load_artifact,
    load_tensors,
    save_tensor_artifact,
)
from acsr_ray.config import Described

WEIGHTS = "weights.safetensors"
KIND = "magnet"


class AutoencoderConfig(Described):
    """Shape of the network."""

    width: int = Field(24, ge=1)
    """Channels between the convolutions."""
    hidden: int = Field(2, ge=1)
    """Convolutions of `width` channels before the last one."""


class Autoencoder(nn.Module):
    """3 x 3 convolutions with rectifiers; output in the range of images.

    Args:
        config: shape of the network.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [3, *[config.width] * config.hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate"), nn.ReLU()]
        last = nn.Conv2d(widths[-1], 3, 3, padding=1, padding_mode="replicate")
        self.layers = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor:
        """Return reconstructions of images (N, 3, H, W), about [0, 1] but not clipped."""
        return self.layers(images)


def save_autoencoder(
    directory: Path, model: Autoencoder, config: AutoencoderConfig, content: Mapping[str, Any]
) -> None:
    """Write a trained autoencoder as artifact `magnet`."""
    description = {"autoencoder": config.describe(), **content}
    save_tensor_artifact(directory, KIND, WEIGHTS, model.state_dict(), description)


def load_autoencoder(directory: Path, device: str = "cpu") -> Autoencoder:
    """Load an autoencoder, frozen; `ArtifactError` when it is not one."""
    manifest = load_artifact(directory, KIND)
    try:
        model = Autoencoder(AutoencoderConfig.from_description(manifest["autoencoder"]))
        model.load_state_dict(load_tensors(directory / WEIGHTS))
    except (KeyError, ValidationError, RuntimeError) as error:
        raise ArtifactError(f"{directory} holds no usable autoencoder: {error}") from error
    return model.requires_grad_(False).eval().to(device)
