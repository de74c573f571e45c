"""Losses that networks are trained on: cross-entropy, adversarial training, TRADES, and RST (Eq. 7).

An objective first draws what a batch needs beside images and labels (`extras`, on CPU, from the batch's own
random numbers), then gives the loss of any part of it. The inner maximisation calls the bare model in
evaluation mode, so that an attack does not move the batch statistics it is crafted against; the loss calls
`network`, which may be the same model made distributed.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.attacks.gradient import TPGD_START, ascend, divergence_from
from acsr_ray.attacks.pgd import pgd
from acsr_ray.attacks.threat import Norm, ThreatModel
from acsr_ray.clustering.gaussians import Gaussians, own_squared_mahalanobis
from acsr_ray.config import Described
from acsr_ray.models.wide_resnet import WideResNet
from acsr_ray.training.feed import ATTACK, Batch

DISTANCE_FLOOR = 1e-6


class InnerAttack(Described):
    """The inner maximisation: the paper's `pgd`, or `single_step`, the CPU preset, from a random start."""

    kind: Literal["pgd", "single_step"] = "pgd"
    """`pgd`: `steps` steps of 2.5 epsilon / steps; `single_step`: one of 1.25 epsilon, cheaper and weaker."""
    steps: int = Field(10, ge=1)
    """pgd: gradient steps, each about as dear as half a step of training."""
    norm: Norm = "l2"
    """`l2` or `linf`."""
    epsilon: float = Field(0.3, gt=0)
    """Radius on the [0, 1] pixel scale: the paper's l2 0.3, or linf 8/255 = 0.0314."""

    @property
    def gradient_steps(self) -> int:
        """Gradient steps of the kind."""
        return self.steps if self.kind == "pgd" else 1

    @property
    def step_size(self) -> float:
        """Length of a step: l2 0.075 and linf 2/255 at the usual radii and ten steps."""
        return self.epsilon * (2.5 / self.steps if self.kind == "pgd" else 1.25)

    @property
    def threat(self) -> ThreatModel:
        """The set that adversarial images stay in."""
        return ThreatModel(self.norm, self.epsilon)


class Objective(Protocol):
    """The loss of one training."""

    def extras(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return what `loss` needs per row beside images and labels, each (n, ...), on CPU."""
        ...

    @property
    def loss(self) -> Callable[..., Tensor]:
        """(images, labels, *extras) of some rows, on the model's device, to their mean loss."""
        ...


class CrossEntropy:
    """Cross-entropy on clean images (Eq. 1)."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def extras(self, batch: Batch) -> tuple[Tensor, ...]:
        """Nothing."""
        return ()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.network(images), labels)


class AdversarialTraining:
    """Cross-entropy on attacked images only (PGD-AT, Madry et al. 2018).

    Args:
        model: the network itself, which the attack calls.
        network: what the loss calls.
        attack: inner maximisation.
        seed: of the random starts.
    """

    def __init__(self, model: nn.Module, network: nn.Module, attack: InnerAttack, seed: int) -> None:
        self.model, self.network, self.attack, self.seed = model, network, attack, seed

    def extras(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the random starts."""
        return (_random_starts(batch, self.attack.threat, self.seed),)

    def loss(self, images: Tensor, labels: Tensor, starts: Tensor) -> Tensor:
        """Return the cross-entropy of attacked images."""
        attacked = attacked_images(self.model, images, labels, starts, self.attack)
        return F.cross_entropy(self.network(attacked), labels)


class RobustSemanticTraining:
    """RST, Eq. 7: cross-entropy of attacked images plus alpha sqrt(d^2 / L + floor).

    d is the Mahalanobis distance of R(x') to the cluster that x was given in stage i; d grows like sqrt(L),
    so it is taken per latent component. With alpha = 0 this is adversarial training.

    Args:
        model: the network itself, which the attack calls.
        network: what the loss calls: images to (latents, logits), see `LatentsAndLogits`.
        attack: inner maximisation, on the cross-entropy alone.
        seed: of the random starts.
        gaussians: clusters of stage i, on the model's device.
        cluster_of: gives the cluster (n,) int64, among the Gaussians, of the rows of a batch.
        alpha: weight of the distance.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        attack: InnerAttack,
        seed: int,
        *,
        gaussians: Gaussians,
        cluster_of: Callable[[Batch], Tensor],
        alpha: float,
    ) -> None:
        self.model, self.network, self.attack, self.seed = model, network, attack, seed
        self.gaussians, self.cluster_of, self.alpha = gaussians, cluster_of, alpha

    def extras(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the random starts and each row's cluster."""
        return _random_starts(batch, self.attack.threat, self.seed), self.cluster_of(batch)

    def loss(self, images: Tensor, labels: Tensor, starts: Tensor, clusters: Tensor) -> Tensor:
        """Return the loss of Eq. 7 without the weight decay, which is the optimiser's."""
        attacked = attacked_images(self.model, images, labels, starts, self.attack)
        latents, logits = self.network(attacked)
        loss = F.cross_entropy(logits, labels)
        if not self.alpha:
            return loss
        squared = own_squared_mahalanobis(latents, self.gaussians, clusters)
        return loss + self.alpha * (squared / latents.shape[1] + DISTANCE_FLOOR).sqrt().mean()


class Trades:
    """TRADES (Zhang et al. 2019): cross-entropy of clean images plus beta KL(clean || attacked).

    Clean and attacked images go through the network as one batch, whose statistics both share.

    Args:
        model: the network itself, which the attack calls.
        network: what the loss calls: images to logits.
        attack: threat model and steps; the inner maximisation is on the divergence.
        seed: of the random starts.
        beta: weight of the divergence.
    """

    def __init__(
        self, model: nn.Module, network: nn.Module, attack: InnerAttack, seed: int, beta: float
    ) -> None:
        self.model, self.network, self.attack, self.seed, self.beta = model, network, attack, seed, beta

    def extras(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return starting points near the images."""
        starts = [
            batch.images[rows] + TPGD_START * torch.randn(batch.images[rows].shape, generator=generator)
            for rows, generator in batch.by_lane(self.seed, ATTACK)
        ]
        return (torch.cat(starts).clamp(0, 1),)

    def loss(self, images: Tensor, labels: Tensor, starts: Tensor) -> Tensor:
        """Return the loss of some rows."""
        model, attack = self.model, self.attack
        model.eval()
        loss = divergence_from(model, images)
        attacked = ascend(
            loss,
            starts,
            images,
            threat=attack.threat,
            steps=attack.gradient_steps,
            step_size=attack.step_size,
        )
        model.train()
        clean, moved = self.network(torch.cat([images, attacked])).chunk(2)
        spread = F.kl_div(
            F.log_softmax(moved, 1), F.log_softmax(clean, 1), reduction="batchmean", log_target=True
        )
        return F.cross_entropy(clean, labels) + self.beta * spread


class LatentsAndLogits(nn.Module):
    """A WideResNet that returns R(x) (N, L) and logits (N, J) of one pass, for a distributed RST."""

    def __init__(self, model: WideResNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents and logits of images (N, 3, H, W) in [0, 1]."""
        latents = self.model.latent(images)
        return latents, self.model.fc(latents)


def attacked_images(
    model: nn.Module, images: Tensor, labels: Tensor, starts: Tensor, attack: InnerAttack
) -> Tensor:
    """Return images attacked on the model in evaluation mode; the model is left in training mode."""
    model.eval()
    attacked = pgd(
        model,
        images,
        labels,
        threat=attack.threat,
        steps=attack.gradient_steps,
        step_size=attack.step_size,
        start=starts,
    )
    model.train()
    return attacked


def _random_starts(batch: Batch, threat: ThreatModel, seed: int) -> Tensor:
    return torch.cat(
        [
            threat.random_start(batch.images[rows], generator)
            for rows, generator in batch.by_lane(seed, ATTACK)
        ]
    )
