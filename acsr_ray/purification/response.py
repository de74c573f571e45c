"""How strongly the trained reconstruction responds to its own output: what tells attacked images from clean.

Of an attacked image the network removes a pattern that classifiers see, and puts its opposite into what it
returns. Asked again, it finds that opposite and takes away more than it did at first; of a clean image there
is little to find. Measured and found, not derived: see "Strength by response" in the README.
"""

from torch import Tensor

LEAST_CHANGE = 1e-3
"""Root mean square on the [0, 1] pixel scale. Of smaller changes, which nobody sees, a ratio says little."""


def response(images: Tensor, once: Tensor, twice: Tensor) -> Tensor:
    """Return the size of the second change over that of the first, (N,) float64 and never negative.

    Args:
        images: (N, C, H, W) in [0, 1].
        once: the images reconstructed, clipped to [0, 1].
        twice: what came from `once` in the same way.
    """
    return _size(twice - once) / _size(once - images)


def _size(change: Tensor) -> Tensor:
    # Bounded, because a root has no slope at 0.
    return change.double().square().flatten(1).mean(1).clamp(min=LEAST_CHANGE**2).sqrt()
