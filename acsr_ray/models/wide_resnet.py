"""Wide residual networks with an explicit latent, `R(x)` of the paper.

Shapes: N images, H x W pixels, L latent length, J classes. Images are float in [0, 1]; normalisation is a
layer of the model. Source: Zagoruyko and Komodakis 2016; "WRN32-10" of the ACSR paper is WRN-34-10.
"""

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "group"]


class WideResNet(nn.Module):
    """WRN-depth-width for small images; `latent(x)` is the pooled output before the linear layer.

    Args:
        depth: 6n + 4 layers.
        width: factor on the 16, 32 and 64 channels of the three groups; L = 64 * width.
        num_classes: J.
        stride: of the first convolution; images of 224 pixels with stride 4 cost as much as 56 with 1.
        norm: `batch`, or `group`, whose statistics are each image's own: for training on many workers
            without GPUs, where batch statistics cannot be shared.

    Raises:
        ValueError: depth is not 6n + 4 with n >= 1, or a count is below 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, depth: int, width: int, num_classes: int, *, stride: int = 1, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1, got {depth}")
        if min(width, num_classes, stride) < 1:
            raise ValueError(
                f"width, num_classes and stride must be >= 1, got {width}, {num_classes}, {stride}"
            )
        self.latent_length = 64 * width
        # Fixed, data-free normalisation keeps every model's input contract [0, 1] and its weights portable.
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5), persistent=False)
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.25), persistent=False)
        self.stem = nn.Conv2d(3, 16, 3, stride, padding=1, bias=False)
        blocks, channels = [], 16
        for group, out in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range((depth - 4) // 6):
                blocks.append(_Block(channels, out, 2 if group and not index else 1, norm))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.norm = _norm(norm, channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def latent(self, images: Tensor) -> Tensor:
        """Return R(x), (N, L), of images (N, 3, H, W) in [0, 1]."""
        features = self.blocks(self.stem((images - self.mean) / self.std))
        return F.relu(self.norm(features)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of images (N, 3, H, W) in [0, 1]."""
        return self.fc(self.latent(images))


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = _norm(norm, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm2 = _norm(norm, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(active)
        return residual + self.conv2(F.relu(self.norm2(self.conv1(active))))


def _norm(norm: Norm, channels: int) -> nn.Module:
    # Every layer has a multiple of 16 channels.
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(channels // 16, channels)


def build_wide_resnet(architecture: str, num_classes: int) -> WideResNet:
    """Build a WideResNet from its name: `wrn-16-2`, `wrn-34-10`, `wrn-28-4-s4`, `wrn-16-2-gn`.

    `-s4` is the stride of the first convolution, for large images; `-gn` takes GroupNorm for BatchNorm.

    Raises:
        ValueError: the name is not of this form.
    """
    match = re.fullmatch(r"wrn-(\d+)-(\d+)(?:-s([1-9]))?(-gn)?", architecture)
    if not match:
        raise ValueError(f"architecture must be wrn-DEPTH-WIDTH[-sSTRIDE][-gn], got {architecture!r}")
    return WideResNet(
        int(match[1]),
        int(match[2]),
        num_classes,
        stride=int(match[3] or 1),
        norm="group" if match[4] else "batch",
    )
