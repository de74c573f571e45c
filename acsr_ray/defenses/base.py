"""The interface of every image defence: images in, defended images out, each for itself.

What a defence does to an image must not depend on the other images of a call, nor on their order, so that a
sweep may cut its work as it likes. Randomised defences therefore draw per image, from their seed and a
digest of the image's 8-bit pixels.
"""

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Classify = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) to logits (N, J)."""

Floats = NDArray[np.floating[Any]]


class Defense(nn.Module):
    """A transform of images (N, 3, H, W) in [0, 1] to images of the same shape, range, dtype and device."""

    randomized: bool = False
    """The result depends on `seed`; `with_seed` gives fresh randomness, for expectation over transforms."""
    differentiable: bool = False
    """Gradients through `forward` are meaningful; otherwise an attacker needs an approximation of them."""
    seed: int = 0
    """Source of the randomness of a randomised defence."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return the defended images.

        Args:
            images: (N, 3, H, W) floating point in [0, 1].

        Raises:
            ValueError: not such images.
        """

    def logits(self, classify: Classify, images: Tensor) -> Tensor:
        """Return logits (N, J) of the defended images; ensembles average their members' probabilities."""
        return classify(self(images))

    def with_seed(self, seed: int) -> Self:
        """Return the same defence with other randomness; it shares the weights and leaves this one as is."""
        fresh = copy.copy(self)
        fresh.seed = seed
        return fresh


class Identity(Defense):
    """No defence: the images as they are."""

    differentiable = True

    def forward(self, images: Tensor) -> Tensor:
        """Return the images."""
        check_batch(images)
        return images


class PerImage(Defense):
    """A defence that works on one array at a time, on the CPU and without gradients."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the defended images; see `Defense.forward`."""
        check_batch(images)
        if not len(images):
            return images.clone()
        arrays = images.detach().cpu().float().permute(0, 2, 3, 1).numpy()
        results = [self.defend(array, image_generator(array, self.seed)) for array in arrays]
        defended = torch.from_numpy(np.stack(results).astype(np.float32)).permute(0, 3, 1, 2)
        return defended.to(images).contiguous().clamp(0, 1)

    @abstractmethod
    def defend(self, image: Floats, generator: np.random.Generator) -> Floats:
        """Return one defended image.

        Args:
            image: (H, W, 3) float32 in [0, 1]; not to be changed in place.
            generator: the image's own source of randomness.
        """


def check_batch(images: Tensor) -> None:
    """Raise `ValueError` unless images are (N, 3, H, W) floats in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (N, 3, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
    # Written so that NaN fails too.
    if len(images) and not bool((images.min() >= 0) & (images.max() <= 1)):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images must be in [0, 1], got values in [{low:.4g}, {high:.4g}]")


def to_bytes(image: Floats) -> NDArray[np.uint8]:
    """Return an image in [0, 1] as contiguous 8-bit pixels of the same shape, rounded to the nearest."""
    return np.ascontiguousarray(np.rint(np.asarray(image) * 255).astype(np.uint8))


def image_generator(image: Floats, seed: int) -> np.random.Generator:
    """Return the random generator of one image (H, W, 3): fixed by the seed and its 8-bit pixels alone."""
    digest = hashlib.blake2b(to_bytes(image).tobytes(), digest_size=16).digest()
    return np.random.default_rng([seed % 2**63, *np.frombuffer(digest, np.uint32).tolist()])
