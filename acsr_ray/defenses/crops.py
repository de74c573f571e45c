"""Ensemble of random crops, rescaled to the full size.

Source: Guo et al. 2018: 30 crops of 90 of 224 pixels, the softmax averaged.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from acsr_ray.defenses.base import Classify, Defense, check_batch, image_generator

SMALLEST_PROBABILITY = 1e-30
"""Floor below the logarithm of an averaged probability."""


class CropEnsemble(Defense):
    """Classify random crops and average the probabilities.

    `forward`, which must return one image, gives the central crop rescaled; `logits` is the defence.

    Args:
        crops: how many crops.
        crop: side of a crop as a share of the image's; the paper's 90 / 224 is 0.4, too little of 32 pixels.

    Raises:
        ValueError: no crops, or a share outside (0, 1].
    """

    randomized = True
    differentiable = True

    def __init__(self, crops: int = 30, crop: float = 0.4) -> None:
        super().__init__()
        if crops < 1:
            raise ValueError(f"crops must be >= 1, got {crops}")
        if not 0 < crop <= 1:
            raise ValueError(f"crop must be in (0, 1], got {crop}")
        self.crops = crops
        self.crop = crop

    def forward(self, images: Tensor) -> Tensor:
        """Return the central crops, rescaled; see `Defense.forward`."""
        check_batch(images)
        slack = self._slack(images)
        return self._cut(images, [(slack[0] // 2, slack[1] // 2)] * len(images))

    def logits(self, classify: Classify, images: Tensor) -> Tensor:
        """Return the log of the average probabilities (N, J) over the crops."""
        check_batch(images)
        arrays = images.detach().cpu().float().permute(0, 2, 3, 1).numpy()
        slack = self._slack(images)
        corners = [
            image_generator(array, self.seed).integers(np.array(slack) + 1, size=(self.crops, 2))
            for array in arrays
        ]
        total: Tensor | float = 0.0
        for k in range(self.crops):
            cut = self._cut(images, [(int(corner[k, 0]), int(corner[k, 1])) for corner in corners])
            total = total + classify(cut).softmax(1)
        return (torch.as_tensor(total) / self.crops).clamp(min=SMALLEST_PROBABILITY).log()

    def _sides(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        return max(1, round(self.crop * height)), max(1, round(self.crop * width))

    def _slack(self, images: Tensor) -> tuple[int, int]:
        sides = self._sides(images)
        return images.shape[-2] - sides[0], images.shape[-1] - sides[1]

    def _cut(self, images: Tensor, corners: list[tuple[int, int]]) -> Tensor:
        """Return the crops with these upper left corners, each rescaled by itself."""
        height, width = self._sides(images)
        size = tuple(images.shape[-2:])
        parts = [
            F.interpolate(
                image[None, :, top : top + height, left : left + width],
                size,
                mode="bilinear",
                align_corners=False,
            )
            for image, (top, left) in zip(images, corners, strict=True)
        ]
        return torch.cat(parts).clamp(0, 1) if parts else images
