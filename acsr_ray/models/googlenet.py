"""GoogLeNet (Inception v1) with batch norm for small images (Szegedy et al. 2015), no auxiliary heads."""

import torch
from torch import Tensor, nn

from acsr_ray.models.blocks import conv_norm_relu, scaled

# 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | pool projection; None is a 3x3 maximum of stride 2.
STAGES: tuple[tuple[int, int, int, int, int, int] | None, ...] = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class GoogLeNet(nn.Module):
    """Nine inception modules; the 7 x 7 stem becomes 3 x 3, and one maximum of the stem stays.

    Args:
        num_classes: J.
        width: factor on every channel count.
        stem_stride: of the first convolution; 1 for 32 x 32 images.
    """

    def __init__(self, num_classes: int, width: float = 1.0, stem_stride: int = 1) -> None:
        super().__init__()
        c1, c2 = scaled(64, width), scaled(192, width)
        layers: list[nn.Module] = [
            conv_norm_relu(3, c1, 3, stem_stride),
            conv_norm_relu(c1, c1, 1),
            conv_norm_relu(c1, c2, 3),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = c2
        for stage in STAGES:
            if stage is None:
                layers.append(nn.MaxPool2d(3, 2, 1))
                continue
            module = _Inception(channels, tuple(scaled(count, width) for count in stage))
            layers.append(module)
            channels = module.out
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of normalised images (N, 3, H, W)."""
        return self.fc(self.features(images).mean((2, 3)))


class _Inception(nn.Module):
    def __init__(self, channels: int, counts: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = counts
        self.out = one + three + five + pool
        self.branches = nn.ModuleList(
            [
                conv_norm_relu(channels, one, 1),
                nn.Sequential(conv_norm_relu(channels, reduce3, 1), conv_norm_relu(reduce3, three, 3)),
                nn.Sequential(conv_norm_relu(channels, reduce5, 1), conv_norm_relu(reduce5, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm_relu(channels, pool, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)
