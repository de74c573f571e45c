"""Defences seen by an attacker who knows them: wrappers that turn one into a model, images to logits.

An attack has one code path; what the attacker knows is in the model it is given. A defence is any callable
images (N, 3, H, W) to images, a classifier any callable images to logits. Wrappers pass `rows(index)` on, so
parts with state per image (`FixedRows`, `LowFrequency`) work inside attacks that drop finished images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.run import BATCH, Attacked, run_attack
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.subset import Model, subset_model
from acsr_ray.attacks.threat import FLOOR, ThreatModel

Defense = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EndToEnd:
    """White box: the defence and the classifier as one differentiable model."""

    defense: Defense
    classify: Model

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (N, J)."""
        return self.classify(self.defense(images))

    def rows(self, index: Tensor) -> "EndToEnd":
        """Return the model for some rows of the batch."""
        return EndToEnd(subset_model(self.defense, index), subset_model(self.classify, index))


@dataclass(frozen=True)
class Bpda:
    """Backward pass differentiable approximation (Athalye et al. 2018): real defence forward, other backward.

    For defences that are not differentiable, or whose gradients mislead. The defence is called without
    gradients; the gradient passes through `backward`, or as it is (identity) when that is None.

    Raises:
        ValueError: on call, when the two passes give images of different shapes.
    """

    defense: Defense
    classify: Model
    backward: Defense | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (N, J) of the really defended images."""
        with torch.no_grad():
            defended = self.defense(images)
        carrier = images if self.backward is None else self.backward(images)
        if carrier.shape != defended.shape:
            raise ValueError(
                f"the defence gives {tuple(defended.shape)}, its backward pass {tuple(carrier.shape)}"
            )
        return self.classify(substitute(carrier, defended))

    def rows(self, index: Tensor) -> "Bpda":
        """Return the model for some rows of the batch."""
        return Bpda(
            subset_model(self.defense, index),
            subset_model(self.classify, index),
            None if self.backward is None else subset_model(self.backward, index),
        )


def substitute(carrier: Tensor, value: Tensor) -> Tensor:
    """Return `value` exactly, with the gradient given to `carrier` as it is."""
    result: Tensor = _Substitute.apply(carrier, value)  # type: ignore[no-untyped-call]
    return result


class _Substitute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, carrier: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass
class Eot:
    """Expectation over transformation (Athalye et al. 2018): the mean logits over a defence's randomness.

    Logits, not probabilities: their mean is an unbiased estimate for any number of samples and so is its
    gradient, and margins (CW, DeepFool, DLR) stay what they are. A mean of probabilities saturates, so that
    the one draw that is still undecided gets all the gradient or none.

    Every call draws anew: call number k uses draws k `samples` to (k + 1) `samples` - 1. A second run of an
    attack repeats the first only with a new `Eot`; how many calls an image sees depends on its batch.

    Args:
        make_model: draw number to the model under that randomness, such as
            `lambda draw: EndToEnd(partial(defend, seed=draw), classify)`.
        samples: draws averaged per call.
        fresh: False uses draws 0 to `samples` - 1 in every call: a deterministic model.
    """

    make_model: Callable[[int], Model]
    samples: int
    fresh: bool = True
    _drawn: list[int] = field(default_factory=lambda: [0], repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the mean logits (N, J)."""
        start = self._drawn[0] if self.fresh else 0
        # Shared with the models of fewer rows: a list, so that those count on as well.
        self._drawn[0] += self.samples
        total = self.make_model(start)(images)
        for draw in range(start + 1, start + self.samples):
            total = total + self.make_model(draw)(images)
        return total / self.samples

    def rows(self, index: Tensor) -> "Eot":
        """Return the model for some rows of the batch, which goes on with the same sequence of draws."""
        make_model = self.make_model
        return Eot(lambda draw: subset_model(make_model(draw), index), self.samples, self.fresh, self._drawn)


@dataclass(frozen=True)
class FixedRows:
    """A function with state for each image of the batch, such as the dictionary it was given when clean.

    `FixedRows(purify_with, (clusters,))` is a defence whose choice the attacker has fixed.

    Args:
        function: images (N, 3, H, W) and the state's rows to images or logits.
        state: tensors of N rows each.
    """

    function: Callable[..., Tensor]
    state: tuple[Tensor, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the function's value; `ValueError` unless there is one row of state per image."""
        for part in self.state:
            _check_rows(part, images)
        return self.function(images, *self.state)

    def rows(self, index: Tensor) -> "FixedRows":
        """Return the function with the state of some rows of the batch."""
        return FixedRows(self.function, tuple(part[index] for part in self.state))


@dataclass(frozen=True)
class LowFrequency:
    """Only the low-pass part of the perturbation counts: an attack on what a high-band defence keeps.

    Attack the model, then take `adversarial` of the result; `attack_low_frequency` does both.

    Args:
        classify: images to logits; the classifier alone, or behind a defence.
        images: (N, 3, H, W) the clean images of the batch.
        band: share of the spectrum along each axis (`fourier_lowpass`), or a linear low-pass of
            (N, 3, H, W), such as the low half of a Tikhonov split.
        threat: the low-pass part is brought to this radius, or an attacker of low frequencies would have
            less of a budget than others; None leaves it as long as it comes.
    """

    classify: Model
    images: Tensor
    band: float | Callable[[Tensor], Tensor]
    threat: ThreatModel | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of the actual images."""
        return self.classify(self.adversarial(images))

    def adversarial(self, images: Tensor) -> Tensor:
        """Return the clean images plus the low-pass part of what was added, clipped to [0, 1]."""
        _check_rows(self.images, images)
        lowpass = self.band if callable(self.band) else fourier_lowpass(self.band)
        delta = lowpass(images - self.images)
        if self.threat is not None:
            length = self.threat.length(delta.detach()).clamp(min=FLOOR)
            delta = delta * (self.threat.radius(self.images) / length)
        return (self.images + delta).clamp(0, 1)

    def rows(self, index: Tensor) -> "LowFrequency":
        """Return the model for some rows of the batch."""
        return replace(self, classify=subset_model(self.classify, index), images=self.images[index])


def attack_low_frequency(
    config: AttackConfig,
    classify: Model,
    images: Tensor,
    labels: Tensor,
    band: float | Callable[[Tensor], Tensor],
    *,
    seed: int,
    keys: Tensor | None = None,
    batch_size: int | None = BATCH,
) -> Attacked:
    """Attack with a low-pass perturbation and return the actual images; see `run_attack`.

    The low-pass perturbation has the declared budget's whole length, also while it is looked for.
    """
    model = LowFrequency(classify, images, band, config.threat)
    free = run_attack(config, model, images, labels, seed=seed, keys=keys, batch_size=batch_size)
    with torch.no_grad():
        actual = model.adversarial(free.unrounded)
    return Attacked(round_to_pixels(actual), actual, free.scaled_back)


@dataclass(frozen=True)
class SelectionLogits:
    """The choice of a cluster as a classifier: logits are minus the squared distances to the clusters.

    Attacked with each clean image's own cluster as its label, an image is pushed to where another cluster
    is nearer, and so gets the wrong dictionary.

    Args:
        distances: images to Mahalanobis distances (N, K), not squared.
        scale: what squared distances are divided by. In L dimensions they can be hundreds apart, where the
            cross-entropy has no gradient left in float32; the latent length L is a good scale. The choice
            is the same at any.
    """

    distances: Callable[[Tensor], Tensor]
    scale: float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (N, K) in the images' dtype."""
        return (-self.distances(images).square() / self.scale).to(images.dtype)


def fourier_lowpass(share: float) -> Callable[[Tensor], Tensor]:
    """Return an ideal low-pass that keeps the lowest `share` of the frequencies along each axis.

    Raises:
        ValueError: share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")

    def lowpass(images: Tensor) -> Tensor:
        down = torch.fft.fftfreq(images.shape[-2], device=images.device).abs() <= share / 2 + 1e-6
        right = torch.fft.rfftfreq(images.shape[-1], device=images.device) <= share / 2 + 1e-6
        kept = down[:, None] & right[None, :]
        return torch.fft.irfft2(torch.fft.rfft2(images) * kept, s=images.shape[-2:])

    return lowpass


def _check_rows(state: Tensor, images: Tensor) -> None:
    if len(state) != len(images):
        raise ValueError(
            f"the model holds state for {len(state)} images and was given {len(images)}: "
            "attacks that go on with some images must ask for `rows`"
        )
