"""ResNet-9, the small residual network of the fast-training literature: much accuracy for little arithmetic.

Source: D. Page, "How to train your ResNet", 2018.
"""

from torch import Tensor, nn

from acsr_ray.models.blocks import conv_norm_relu, scaled


class ResNet9(nn.Module):
    """Six 3 x 3 convolutions that widen and shrink, with two residual pairs, and one linear layer.

    Args:
        num_classes: J.
        width: factor on every channel count; 1 is 64-128-256-512.
        stem_stride: of the first convolution; 1 for 32 x 32 images.
    """

    def __init__(self, num_classes: int, width: float = 1.0, stem_stride: int = 1) -> None:
        super().__init__()
        c1, c2, c3, c4 = (scaled(count, width) for count in (64, 128, 256, 512))
        self.features = nn.Sequential(
            conv_norm_relu(3, c1, 3, stem_stride),
            conv_norm_relu(c1, c2, 3),
            nn.MaxPool2d(2),
            _Pair(c2),
            conv_norm_relu(c2, c3, 3),
            nn.MaxPool2d(2),
            conv_norm_relu(c3, c4, 3),
            nn.MaxPool2d(2),
            _Pair(c4),
        )
        self.fc = nn.Linear(c4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of normalised images (N, 3, H, W), H and W at least 8 * stem_stride."""
        return self.fc(self.features(images).amax((2, 3)))


class _Pair(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm_relu(channels, channels, 3), conv_norm_relu(channels, channels, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)
