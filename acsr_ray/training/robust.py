"""Stage ii: robust semantic training (RST), the paper's Eq. 7 as adversarial training with a latent pull.

min over theta of E[ max over x' of CE(f(x'), y) + alpha sqrt(d^2 / L + floor) ] + weight decay, where d is
the Mahalanobis distance of R(x') to the cluster that x was given in stage i. The inner maximisation is on
the cross-entropy alone; d grows like sqrt(L), so it is taken per latent component.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.artifacts import artifact_digest, load_artifact, load_tensors
from acsr_ray.attacks.pgd import attack_pixels, pgd
from acsr_ray.attacks.threat import Norm, ThreatModel
from acsr_ray.clustering.assignments import ASSIGNMENTS, GAUSSIANS, Assignments
from acsr_ray.clustering.gaussians import Gaussians, locate_clusters, own_squared_mahalanobis
from acsr_ray.config import Described, Device, JobSettings
from acsr_ray.corpus.labelled import LabelledImages, read_labelled
from acsr_ray.models.classifier import load_classifier, save_classifier
from acsr_ray.models.wide_resnet import WideResNet, build_wide_resnet
from acsr_ray.training.baseline import log_epoch, validation_metrics
from acsr_ray.training.loop import OptimizerConfig, accuracy, fit, predict, resolve_device

DISTANCE_FLOOR = 1e-6
ATTACK_EVALUATION_IMAGES = 1000


class InnerAttack(Described):
    """The inner maximisation: the paper's `pgd`, or `single_step`, the CPU preset, from a random start."""

    kind: Literal["pgd", "single_step"] = "pgd"
    """`pgd`: 10 steps of epsilon / 4; `single_step`: one step of 1.25 epsilon, ten times cheaper, weaker."""
    norm: Norm = "l2"
    """`l2` or `linf`."""
    epsilon: float = Field(0.3, gt=0)
    """Radius on the [0, 1] pixel scale: the paper's l2 0.3, or linf 8/255 = 0.0314."""

    @property
    def steps(self) -> int:
        """Gradient steps."""
        return 10 if self.kind == "pgd" else 1

    @property
    def step_size(self) -> float:
        """Length of a step: l2 0.075 and linf 2/255 at the usual radii."""
        return self.epsilon * (0.25 if self.kind == "pgd" else 1.25)


class TrainRobustSettings(JobSettings):
    """Train the robust encoder f_rob (stage ii, RST) and write it as an artifact."""

    train: tuple[str, ...] = Field(min_length=1)
    """The training shards that learn_semantics clustered."""
    validation: tuple[str, ...] = ()
    """Validation shards for the closing clean and attacked accuracy."""
    baseline: Path
    """Artifact of train_baseline: architecture, and weights when `init` is baseline."""
    semantics: Path
    """Artifact of learn_semantics: each image's cluster and the clusters' Gaussians."""
    output: Path
    """Folder of the artifact (`robust/`)."""
    init: Literal["baseline", "random"] = "baseline"
    """Starting weights."""
    alpha: float = Field(0.1, ge=0)
    """Weight of the latent distance; 0 is plain adversarial training."""
    attack: InnerAttack = InnerAttack()
    """Inner maximisation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Schedule and optimiser."""
    device: Device = "auto"
    """Where to train."""
    seed: int = 1
    """Fixes initialisation, shuffling, augmentation and attacks."""


def train_robust(settings: TrainRobustSettings) -> dict[str, Any]:
    """Train f_rob, save it as artifact `robust` and return its closing metrics."""
    device = resolve_device(settings.device)
    baseline = load_classifier(settings.baseline, "baseline")
    load_artifact(settings.semantics, "semantics")
    config = baseline.config
    data = read_labelled(settings.train, config.image_size)
    gaussians, index = _targets(settings.semantics, data)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = build_wide_resnet(config.architecture, config.num_classes)
    if settings.init == "baseline":
        model.load_state_dict(baseline.model.state_dict())
    objective = rst_objective(
        model,
        gaussians.to(device, torch.float32),
        index.to(device),
        settings.alpha,
        settings.attack,
        torch.Generator().manual_seed(settings.seed),
    )
    fit(
        model,
        data.pixels,
        data.labels,
        objective,
        settings.optimizer,
        device=device,
        seed=settings.seed,
        on_epoch=log_epoch,
    )
    metrics = {
        "inner attack": settings.attack.kind,
        **validation_metrics(model, settings.validation, config.image_size, device),
        **attacked_metrics(model, settings.validation, settings.attack, config.image_size, device),
    }
    content = {
        "settings": settings.model_dump(mode="json", exclude={"config", "output"}),
        "metrics": metrics,
        "baseline_digest": artifact_digest(settings.baseline),
        "semantics_digest": artifact_digest(settings.semantics),
    }
    save_classifier(settings.output, "robust", model, config, baseline.class_names, content)
    return metrics


def rst_objective(
    model: WideResNet,
    gaussians: Gaussians,
    index: Tensor,
    alpha: float,
    attack: InnerAttack,
    generator: torch.Generator,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the loss of one batch (Eq. 7).

    Args:
        model: network in training.
        gaussians: clusters of stage i, on the model's device.
        index: (N,) cluster of every training image among the Gaussians.
        alpha: weight of the distance term.
        attack: inner maximisation.
        generator: source of random starts.
    """
    threat = ThreatModel(attack.norm, attack.epsilon)

    def objective(images: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
        # Evaluation mode: the attack must not move the batch statistics it is crafted against.
        model.eval()
        adversarial = pgd(
            model,
            images,
            labels,
            threat=threat,
            steps=attack.steps,
            step_size=attack.step_size,
            generator=generator,
        )
        model.train()
        latents = model.latent(adversarial)
        loss = F.cross_entropy(model.fc(latents), labels)
        if not alpha:
            return loss
        squared = own_squared_mahalanobis(latents, gaussians, index[chosen.to(index.device)])
        distance = (squared / latents.shape[1] + DISTANCE_FLOOR).sqrt()
        return loss + alpha * distance.mean()

    return objective


def _targets(semantics: Path, data: LabelledImages) -> tuple[Gaussians, Tensor]:
    gaussians = Gaussians.unpack(load_tensors(semantics / GAUSSIANS))
    keys = [
        (data.shards[shard], row)
        for shard, row in zip(data.shard_of.tolist(), data.rows.tolist(), strict=True)
    ]
    cluster_id = Assignments.load(semantics / ASSIGNMENTS).clusters_of(keys)
    return gaussians, locate_clusters(gaussians, data.labels.tolist(), cluster_id.tolist())


def attacked_metrics(
    model: nn.Module, shards: tuple[str, ...], attack: InnerAttack, image_size: int, device: str
) -> dict[str, Any]:
    """Return the white-box accuracy under 10-step PGD, whatever attack was trained on; {} without shards."""
    if not shards:
        return {}
    held_out = read_labelled(shards, image_size)
    pixels = held_out.pixels[:ATTACK_EVALUATION_IMAGES]
    labels = held_out.labels[:ATTACK_EVALUATION_IMAGES]
    attacked = attack_pixels(model, pixels, labels, ThreatModel(attack.norm, attack.epsilon), device)
    return {
        "pgd_images": len(labels),
        "pgd_accuracy": accuracy(predict(model, attacked, device), labels),
    }
