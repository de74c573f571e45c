"""VGG-16 with batch norm for small images (Simonyan and Zisserman 2015)."""

from torch import Tensor, nn

from acsr_ray.models.blocks import conv_norm_relu, scaled

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(channels, convolutions) of each stage; a 2 x 2 maximum follows each."""


class Vgg16(nn.Module):
    """Thirteen 3 x 3 convolutions, global average pooling, one linear layer.

    The two hidden linear layers of the original serve 224 x 224 images and are left out, as usual at 32 x 32.

    Args:
        num_classes: J.
        width: factor on every channel count.
        stem_stride: of the first convolution; 1 for 32 x 32 images.
    """

    def __init__(self, num_classes: int, width: float = 1.0, stem_stride: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, stride = 3, stem_stride
        for full, count in STAGES:
            out = scaled(full, width)
            for _ in range(count):
                layers.append(conv_norm_relu(channels, out, 3, stride))
                channels, stride = out, 1
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of normalised images (N, 3, H, W), H and W above 31 * stem_stride."""
        return self.fc(self.features(images).mean((2, 3)))
