"""Noise level of images, from the finest diagonal differences: little but noise is left there."""

from torch import Tensor

MAD_OF_NORMAL = 0.6745
"""Median absolute value of a standard normal variable."""


def noise_level(images: Tensor) -> Tensor:
    """Estimate the standard deviation of white noise, per image.

    The finest diagonal Haar coefficients of all channels, their median absolute value over that of a normal
    variable (Donoho and Johnstone 1994). Texture adds to it; a constant image has 0.

    Args:
        images: (N, C, H, W), or a high band of images; smaller than 2 x 2 pixels gives 0.

    Returns:
        (N,) in the images' dtype and scale.
    """
    height, width = images.shape[-2] // 2 * 2, images.shape[-1] // 2 * 2
    if not height or not width:
        return images.new_zeros(len(images))
    even, odd = images[..., :height:2, :width], images[..., 1:height:2, :width]
    diagonal = (even[..., ::2] - even[..., 1::2] - odd[..., ::2] + odd[..., 1::2]) / 2
    return diagonal.flatten(1).abs().median(dim=1).values / MAD_OF_NORMAL
