"""ResNet-50 for small images (He et al. 2016)."""

import torch.nn.functional as F
from torch import Tensor, nn

from acsr_ray.models.blocks import conv_norm, conv_norm_relu, scaled

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""(bottleneck channels, blocks, stride of the first block) of each stage."""
EXPANSION = 4


class ResNet50(nn.Module):
    """Bottleneck residual network; the 7 x 7 stem with its pooling becomes one 3 x 3 convolution.

    Args:
        num_classes: J.
        width: factor on every channel count.
        stem_stride: of the first convolution; 1 for 32 x 32 images.
    """

    def __init__(self, num_classes: int, width: float = 1.0, stem_stride: int = 1) -> None:
        super().__init__()
        channels = scaled(64, width)
        self.stem = conv_norm_relu(3, channels, 3, stem_stride)
        blocks: list[nn.Module] = []
        for full, count, stride in STAGES:
            inner = scaled(full, width)
            for index in range(count):
                blocks.append(_Bottleneck(channels, inner, 1 if index else stride))
                channels = EXPANSION * inner
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of normalised images (N, 3, H, W)."""
        return self.fc(self.blocks(self.stem(images)).mean((2, 3)))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * inner
        last = conv_norm(inner, out, 1)
        # Each block starts as the identity, which a short one-cycle schedule needs at this depth.
        nn.init.zeros_(last[1].weight)  # type: ignore[arg-type]
        self.body = nn.Sequential(
            conv_norm_relu(channels, inner, 1), conv_norm_relu(inner, inner, 3, stride), last
        )
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.body(x))
