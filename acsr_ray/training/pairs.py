"""Pairs of an attacked image and its original, made on the fly, for training a purifier.

Every step attacks a batch on one surrogate with one attack, drawn from the step's own random numbers, at a
strength drawn for each image. What a purifier is trained to undo must look like what attackers do: many
budgets in two norms, few steps and several, with and without the sign, and 8-bit pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.attacks.apgd import margin
from acsr_ray.attacks.gradient import ascend, cross_entropy_of
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.config import Described
from acsr_ray.training.feed import ATTACK, Batch

ATTACKS = ("fgsm", "bim", "pgd", "cw")
STEP_OF_RADIUS = 2.0
"""Several steps have together so many times the radius."""


class PairConfig(Described):
    """Which attacked images a purifier is trained on."""

    kind: Literal["adversarial", "gaussian"] = "adversarial"
    """`gaussian`: white noise of the same l2 norms, the control that no surrogate is needed for."""
    relative_l2: float = Field(0.05, ge=0)
    """Largest relative l2 norm; each image's is uniform between 0 and this."""
    linf: float = Field(8 / 255, ge=0)
    """Largest linf norm on the [0, 1] pixel scale; each image's is uniform between 0 and this."""
    linf_share: float = Field(0.4, ge=0, le=1)
    """Share of the steps whose budget is linf."""
    steps: int = Field(4, ge=1)
    """Most gradient steps of an attack."""
    clean: float = Field(0.2, ge=0, le=1)
    """Share of the images that are not attacked."""


@dataclass(frozen=True)
class Recipe:
    """The attack of one step: surrogate, `ATTACKS` position, norm, gradient steps."""

    surrogate: int
    attack: int
    linf: bool
    steps: int

    def tensor(self, rows: int) -> Tensor:
        """Return the recipe as (rows, 4) int64, to travel with the images of a batch."""
        numbers = [self.surrogate, self.attack, int(self.linf), self.steps]
        return torch.tensor(numbers).expand(rows, -1)

    @classmethod
    def from_tensor(cls, rows: Tensor) -> "Recipe":
        """Restore from `tensor`."""
        surrogate, attack, linf, steps = rows[0].tolist()
        return cls(surrogate, attack, bool(linf), steps)


@dataclass(frozen=True)
class Drawn:
    """Random numbers of a batch of n images, on CPU.

    `share` (n,) in [0, 1] is each image's part of the largest radius, 0 for clean ones; `noise` (n, C, S, S)
    is standard normal.
    """

    recipe: Recipe
    share: Tensor
    noise: Tensor


def draw_pairs(batch: Batch, config: PairConfig, surrogates: int, seed: int) -> Drawn:
    """Draw the attack of a batch; the same for any number of workers, and after a kill."""
    common = batch.shared_generator(seed, ATTACK)
    attack = int(torch.randint(len(ATTACKS), (), generator=common))
    steps = int(torch.randint(2, max(config.steps, 2) + 1, (), generator=common))
    recipe = Recipe(
        surrogate=int(torch.randint(surrogates, (), generator=common)),
        attack=attack,
        linf=bool(torch.rand((), generator=common) < config.linf_share) and ATTACKS[attack] != "cw",
        steps=1 if ATTACKS[attack] == "fgsm" else min(steps, config.steps),
    )
    shares, noises = [], []
    for rows, generator in batch.by_lane(seed, ATTACK):
        count = len(batch.labels[rows])
        share = torch.rand(count, generator=generator)
        attacked = torch.rand(count, generator=generator) >= config.clean
        shares.append(share * attacked)
        noises.append(torch.randn(batch.images[rows].shape, generator=generator))
    return Drawn(recipe, torch.cat(shares), torch.cat(noises))


def attack_pairs(
    surrogate: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    share: Tensor,
    noise: Tensor,
    config: PairConfig,
) -> Tensor:
    """Return attacked images as 8-bit pixels in [0, 1]; where the share is 0, the images themselves.

    Args:
        surrogate: images to logits, in evaluation mode.
        images: (n, 3, S, S) in [0, 1].
        labels: (n,) true labels.
        recipe: the attack.
        share: (n,) part of the largest radius.
        noise: (n, 3, S, S) standard normal: the random start, or the perturbation itself.
        config: largest radii.
    """
    norm: Literal["linf", "relative_l2"] = "linf" if recipe.linf else "relative_l2"
    threat = SharedThreat(norm, config.linf if recipe.linf else config.relative_l2, share.view(-1, 1, 1, 1))
    if config.kind == "gaussian":
        # In linf, as long as the sign attacks are: every pixel moves by the radius on average.
        noisy = images + threat.radius(images) * noise if recipe.linf else threat.reach(noise, images)
        return round_to_pixels(noisy.clamp(0, 1))
    name = ATTACKS[recipe.attack]
    start = threat.project(images + threat.radius(images) * threat.direction(noise), images)
    loss = _margin_of(surrogate, labels) if name == "cw" else cross_entropy_of(surrogate, labels)
    step = threat.epsilon * (1.0 if recipe.steps == 1 else STEP_OF_RADIUS / recipe.steps)
    attacked = ascend(
        loss,
        start if name == "pgd" else images,
        images,
        threat=threat,
        steps=recipe.steps,
        step_size=step,
        sign=name in ("fgsm", "bim"),
    )
    return round_to_pixels(attacked)


@dataclass(frozen=True)
class SharedThreat(ThreatModel):
    """A ball whose radius is for each image a share (N, 1, 1, 1) of the largest one."""

    share: Tensor

    def unit(self, images: Tensor) -> Tensor:
        """Return the length (N, 1, 1, 1) that epsilon counts in."""
        return super().unit(images) * self.share


def _margin_of(model: nn.Module, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the summed margin of the best wrong logit over the true one, as a function of images (CW)."""
    return lambda images: -margin(model(images), labels).sum()
