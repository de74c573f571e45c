"""The classifier whose mistakes doubt is about, asked about images before and after purification.

Shapes: N images, J classes. Answers are in float64 and the same for an image whatever its neighbours: the
classifier always sees micro-batches of a fixed shape, filled up with zeros.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acsr_ray.models.classifier import ENCODER_MICRO_BATCH, fit_to, pad_batch
from acsr_ray.models.targets import load_target
from acsr_ray.purification.purifier import Purifier

OWN_CLASSES = "bundle"
"""What names the class layer of a bundle's encoder, in place of a target's digest."""


@dataclass(frozen=True)
class Opinion:
    """What a classifier says of N images before and after purification."""

    label_before: Tensor
    """(N,) int64."""
    label_after: Tensor
    """(N,) int64."""
    log_odds: Tensor
    """(N,) of its label against all other classes, on the purified image: log p / (1 - p)."""
    divergence: Tensor
    """(N,) Kullback-Leibler divergence of the prediction after from that before, in nats, >= 0."""


@dataclass(frozen=True)
class Judge:
    """A classifier in evaluation mode for images of any size."""

    model: nn.Module
    """Images (N, 3, S, S) in [0, 1] to logits (N, J)."""
    image_size: int
    """S; copies of images of another size are resized to it."""
    digest: str
    """What names it: a target's digest, or `OWN_CLASSES`."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of images (N, 3, H, W); differentiable, for attacks on it."""
        logits: Tensor = self.model(fit_to(images, self.image_size))
        return logits

    @torch.no_grad()
    def compare(self, before: Tensor, after: Tensor) -> Opinion:
        """Return what the classifier says of images (N, 3, H, W) and of the purified ones, N >= 1."""
        before, after = fit_to(before, self.image_size), fit_to(after, self.image_size)
        size = ENCODER_MICRO_BATCH[before.device.type]
        pairs = zip(before.split(size), after.split(size), strict=True)
        parts = [self._compare(*pair, size) for pair in pairs]
        return Opinion(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _compare(self, before: Tensor, after: Tensor, size: int) -> tuple[Tensor, ...]:
        """Return the four columns of an opinion on at most `size` images, computed in that fixed shape."""
        first, second = (
            F.log_softmax(self.model(pad_batch(part, size).contiguous()).double(), 1)
            for part in (before, after)
        )
        best, label = second.max(1)
        # Not log(1 - p), which is nothing but rounding once the classifier is sure.
        others = second.scatter(1, label[:, None], -torch.inf).logsumexp(1)
        divergence = (first.exp() * (first - second)).sum(1).clamp(min=0)
        columns = first.argmax(1), label, best - others, divergence
        return tuple(column[: len(before)] for column in columns)


def load_judge(purifier: Purifier, target: str | None, image_size: int | None = None) -> Judge:
    """Return the classifier that doubt is about, on the purifier's device.

    Args:
        purifier: whose encoder's class layer judges where there is no target.
        target: location as for `load_target`; None: the encoder itself.
        image_size: side in pixels of what a target sees; what it says of itself when omitted, or else what
            the encoder sees. The encoder itself always sees its own size.

    Raises:
        TargetError: no target there.
        ArtifactError: a target of another kind or whose bytes changed.
    """
    own_size = purifier.config.encoder.image_size
    if target is None:
        return Judge(purifier.encoder, own_size, OWN_CLASSES)
    loaded = load_target(target, str(purifier.device))
    return Judge(loaded.model, image_size or loaded.image_size or own_size, loaded.digest)
