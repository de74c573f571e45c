"""The purifier as a preprocessing defence of the Adversarial Robustness Toolbox (ART, the extra `art`).

The only module that imports ART. Arrays and tensors are (N, 3, H, W), or (N, H, W, 3) where `channels_first`
is False, in [0, 1].
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acsr_ray.config import MissingExtraError
from acsr_ray.purification.purifier import Purifier

try:
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
except ImportError as error:
    raise MissingExtraError("ART is not installed: pip install 'acsr-ray[art]'") from error

ROUNDING = 1e-4
"""How far values of attacks may be off [0, 1] and are taken for its ends."""


class PurifierPreprocessor(PreprocessorPyTorch):  # type: ignore[misc]
    """Purify what a classifier of ART is given, as one of its `preprocessing_defences`.

    ART's attacks then are white-box: gradients are those of the purifier and the classifier together.

    Args:
        purifier: what to purify with; computes on its own device.
        channels_first: whether arrays are (N, 3, H, W); (N, H, W, 3) otherwise.
        apply_fit: purify in `fit` too, so that a classifier is trained on purified images.
        apply_predict: purify in `predict`, and for gradients.
        batch_size: most images per call of the purifier; decides memory, never pixels.

    Raises:
        ValueError: a batch size that is not positive.
    """

    params = ["purifier", "channels_first", "batch_size"]  # noqa: RUF012  (a list in ART)

    def __init__(
        self,
        purifier: Purifier,
        *,
        channels_first: bool = True,
        apply_fit: bool = False,
        apply_predict: bool = True,
        batch_size: int = 64,
    ) -> None:
        super().__init__("cpu", is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self.purifier = purifier
        self.channels_first = channels_first
        self.batch_size = batch_size
        self._check_params()

    @property
    def device(self) -> torch.device:
        """The purifier's."""
        return self.purifier.device

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:  # noqa: ANN401  (labels of any kind)
        """Purify; differentiable.

        Args:
            x: images, floating point in [0, 1].
            y: labels, which come back as they are.

        Returns:
            Images in the shape, dtype and device of `x`, in [0, 1], and `y`.

        Raises:
            ValueError: as `Purifier.purify`; pixels of 0 to 255 among them.
        """
        images = x if self.channels_first else x.permute(0, 3, 1, 2)
        purified = torch.cat([self.purifier(_rounded(part)) for part in images.split(self.batch_size)])
        return (purified if self.channels_first else purified.permute(0, 2, 3, 1)).to(x), y

    def __call__(self, x: NDArray[Any], y: Any = None) -> tuple[NDArray[Any], Any]:  # noqa: ANN401
        """Purify an array; see `forward`."""
        with torch.no_grad():
            purified, _ = self.forward(torch.as_tensor(np.asarray(x)))
        return np.ascontiguousarray(purified.numpy()), y

    def _check_params(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")


def _rounded(images: Tensor) -> Tensor:
    """Return images with values just outside of [0, 1] at its ends, and those further off as they are."""
    inside = images.clamp(0, 1)
    return torch.where((images - inside).abs() <= ROUNDING, inside, images)
