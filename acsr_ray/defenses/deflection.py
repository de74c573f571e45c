"""Pixel deflection: swap a few pixels for random neighbours, then denoise by wavelets.

Source: Prakash et al. 2018, Deflecting Adversarial Attacks with Pixel Deflection. Their saliency map (robust
activation map), which steers deflections away from the object, is left out: pixels are drawn uniformly.
"""

import warnings

import numpy as np
from skimage.restoration import denoise_wavelet

from acsr_ray.defenses.base import Floats, PerImage

SMALLEST_SIDE = 4
"""Images with a shorter side have no wavelet decomposition, and are only deflected."""


class PixelDeflection(PerImage):
    """Random local replacement of pixels and BayesShrink of the wavelet coefficients in YCbCr.

    Args:
        deflections: pixels replaced, one after the other.
        window: largest distance in rows and columns to the pixel copied.
        sigma: noise standard deviation that the shrinkage assumes, for images in [0, 1].

    Raises:
        ValueError: a negative count, a window below 1, or sigma not above 0.
    """

    randomized = True

    def __init__(self, deflections: int = 100, window: int = 10, sigma: float = 0.04) -> None:
        super().__init__()
        if deflections < 0 or window < 1 or not sigma > 0:
            raise ValueError(
                f"deflections must be >= 0, window >= 1 and sigma > 0, got {deflections}, {window}, {sigma}"
            )
        self.deflections = deflections
        self.window = window
        self.sigma = sigma

    def defend(self, image: Floats, generator: np.random.Generator) -> Floats:
        """Return the deflected and denoised image; see `PerImage.defend`."""
        deflected = self.deflect(image, generator)
        if min(image.shape[:2]) < SMALLEST_SIDE:
            return deflected
        with warnings.catch_warnings():
            # Small images allow fewer levels than the library would like.
            warnings.simplefilter("ignore")
            return denoise_wavelet(
                deflected,
                self.sigma,
                wavelet="db1",
                mode="soft",
                convert2ycbcr=True,
                method="BayesShrink",
                channel_axis=-1,
                rescale_sigma=True,
            )

    def deflect(self, image: Floats, generator: np.random.Generator) -> Floats:
        """Return a copy (H, W, 3) with `deflections` pixels replaced by others of their window."""
        result = np.array(image)
        last = np.array(image.shape[:2]) - 1
        targets = generator.integers(last + 1, size=(self.deflections, 2))
        offsets = generator.integers(-self.window, self.window + 1, size=(self.deflections, 2))
        for target, source in zip(targets, np.clip(targets + offsets, 0, last), strict=True):
            result[tuple(target)] = result[tuple(source)]
        return result
