"""AlexNet for small images (Krizhevsky et al. 2012), with batch norm where the original has LRN.

Normalisation of the input is not part of it; see `targets`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from acsr_ray.models.blocks import conv_norm_relu, scaled

POOLED = 4


class AlexNet(nn.Module):
    """Five convolutions and three linear layers; the 11 x 11 stem becomes 3 x 3.

    Args:
        num_classes: J.
        width: factor on every channel count; 1 is 64-192-384-256-256 and 1,024 hidden units.
        stem_stride: of the first convolution; 1 for 32 x 32 images.
    """

    def __init__(self, num_classes: int, width: float = 1.0, stem_stride: int = 1) -> None:
        super().__init__()
        c1, c2, c3, c4 = (scaled(count, width) for count in (64, 192, 384, 256))
        hidden = scaled(1024, width)
        self.features = nn.Sequential(
            conv_norm_relu(3, c1, 3, stem_stride),
            nn.MaxPool2d(2),
            conv_norm_relu(c1, c2, 3),
            nn.MaxPool2d(2),
            conv_norm_relu(c2, c3, 3),
            conv_norm_relu(c3, c4, 3),
            conv_norm_relu(c4, c4, 3),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(c4 * POOLED**2, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
        )
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of normalised images (N, 3, H, W)."""
        pooled = F.adaptive_avg_pool2d(self.features(images), POOLED)
        return self.fc(self.classifier(pooled.flatten(1)))
