"""Rivals that need a trained network: MagNet's reformer and PixelDefend."""

import torch
from torch import Tensor

from acsr_ray.defenses.base import Defense, check_batch
from acsr_ray.models.autoencoder import Autoencoder
from acsr_ray.models.classifier import pad_batch
from acsr_ray.models.pixel_cnn import PixelCnn, most_likely_nearby

MICRO_BATCH = 16
"""Images per call of a network. Fixed, because matrix products differ in the last bit between batch sizes."""
LEVEL_ROUNDING = 1e-6


class Magnet(Defense):
    """MagNet's reformer: the image through a denoising autoencoder.

    The detector, which refuses images, is left out: every defence here answers for every image.
    Source: Meng and Chen 2017.

    Args:
        autoencoder: trained.
    """

    differentiable = True

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> Tensor:
        """Return the reconstructions; see `Defense.forward`."""
        check_batch(images)
        device = next(self.autoencoder.parameters()).device
        parts = [
            # Contiguous, because the memory layout chooses the kernel, and filling up changes the layout.
            self.autoencoder(pad_batch(part, MICRO_BATCH).contiguous())[: len(part)].clamp(0, 1)
            for part in images.to(device, torch.float32).split(MICRO_BATCH)
            if len(part)
        ]
        return torch.cat(parts).to(images) if parts else images.clone()


class PixelDefend(Defense):
    """Greedy ascent of a PixelCNN's likelihood within an L_inf ball.

    Every image is purified, without the paper's optional test of its likelihood. Source: Song et al. 2018.

    Args:
        model: trained.
        epsilon: radius of the ball for images in [0, 1], in whole levels of 1/255 (rounded down).

    Raises:
        ValueError: epsilon negative.
    """

    def __init__(self, model: PixelCnn, epsilon: float = 16 / 255) -> None:
        super().__init__()
        if epsilon < 0:
            raise ValueError(f"epsilon must be >= 0, got {epsilon}")
        self.model = model
        self.reach = int(epsilon * 255 + LEVEL_ROUNDING)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the purified images, in whole levels of 1/255; see `Defense.forward`."""
        check_batch(images)
        device = next(self.model.parameters()).device
        levels = (images.detach().to(device, torch.float32) * 255).round()
        parts = [
            most_likely_nearby(self.model, pad_batch(part, MICRO_BATCH), self.reach)[: len(part)]
            for part in levels.split(MICRO_BATCH)
            if len(part)
        ]
        return (torch.cat(parts) / 255).to(images) if parts else images.clone()
