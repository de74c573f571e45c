"""A small plain CNN: the demo's target classifier, unlike the encoder in architecture and seed."""

import torch.nn.functional as F
from torch import Tensor, nn


class SmallCnn(nn.Module):
    """Three convolutions and two linear layers for 32 x 32 images in [0, 1].

    Args:
        num_classes: J.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 5, padding=2)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 16, 96)
        self.fc = nn.Linear(96, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of images (N, 3, 32, 32)."""
        x = F.max_pool2d(F.relu(self.conv1(images * 2 - 1)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.fc(F.relu(self.hidden(x.flatten(1))))
