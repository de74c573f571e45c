"""Target classifiers for attack evaluation: plain or adversarially trained, from scratch or from weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.artifacts import artifact_kind, file_digest, load_artifact, load_tensors
from acsr_ray.attacks.pgd import pgd
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.config import Device, JobSettings
from acsr_ray.corpus.labelled import read_labelled
from acsr_ray.models.targets import (
    DEFAULT_MEAN,
    DEFAULT_STD,
    NETWORKS,
    WEIGHTS,
    Channels,
    Normalized,
    PositiveChannels,
    TargetConfig,
    TargetError,
    build_target,
    initialize_weights,
    save_target,
)
from acsr_ray.training.baseline import log_epoch, validation_metrics
from acsr_ray.training.loop import OptimizerConfig, fit, resolve_device
from acsr_ray.training.robust import InnerAttack, attacked_metrics

LARGE_IMAGE = 48
"""Above this side, the first convolution gets stride 2 unless told otherwise."""


class TrainTargetSettings(JobSettings):
    """Train a target classifier on labelled Parquet shards and write it as an artifact."""

    train: tuple[str, ...] = Field(min_length=1)
    """Training shards: Parquet files or folders with columns `image` and `label`."""
    validation: tuple[str, ...] = ()
    """Validation shards; the closing accuracy is measured there."""
    output: Path
    """Folder of the artifact (`target/`)."""
    architecture: str = "vgg16"
    """`alexnet`, `vgg16`, `resnet9`, `resnet50`, `googlenet`, `small_cnn` or `wrn-DEPTH-WIDTH`."""
    width: float = Field(1.0, gt=0)
    """Factor on every channel count, 0.25 for CPUs; not for `small_cnn` and `wrn`."""
    image_size: int = Field(32, ge=8)
    """Side in pixels of the square that the network sees."""
    stem_stride: int | None = Field(None, ge=1)
    """Stride of the first convolution; by default 1 up to 48 pixels and 2 above."""
    mean: Channels = DEFAULT_MEAN
    """Normalisation, per channel; that of your pretrained weights when you start from some."""
    std: PositiveChannels = DEFAULT_STD
    """Normalisation, per channel."""
    adversarial: bool = False
    """Train on attacked images only (Madry et al. 2018)."""
    attack: InnerAttack = InnerAttack(norm="linf", epsilon=8 / 255)
    """Inner maximisation of adversarial training."""
    init_weights: Path | None = None
    """Pretrained weights to start from: a target artifact or a safetensors file of the same architecture."""
    optimizer: OptimizerConfig = OptimizerConfig(epochs=20)
    """Schedule and optimiser."""
    device: Device = "auto"
    """Where to train; auto takes a GPU if there is one."""
    seed: int = 0
    """Fixes initialisation, shuffling, augmentation and attacks."""


def train_target(settings: TrainTargetSettings) -> dict[str, Any]:
    """Train a target, save it as artifact `target` and return its closing metrics.

    Raises:
        TargetError: unknown architecture, options it does not have, weights that do not fit it, or images of
            fewer than two classes.
        ArtifactError: weights that cannot be read or were changed.
        CorpusError: no readable shard.
    """
    # What cannot be built should fail before a large corpus is read.
    with torch.device("meta"):
        build_target(_config_of(settings, 2))
    data = read_labelled(settings.train, settings.image_size)
    if len(data.class_names) < 2:
        raise TargetError(f"a classifier needs two classes, the training shards have {len(data.class_names)}")
    config = _config_of(settings, len(data.class_names))
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = build_target(config)
        # Dropout draws from the global generator.
        torch.manual_seed(settings.seed)
        initial = _initialize(model, config, settings.init_weights)
        device = resolve_device(settings.device)
        generator = torch.Generator().manual_seed(settings.seed)

        def objective(images: Tensor, labels: Tensor, _: Tensor) -> Tensor:
            if settings.adversarial:
                images = _attacked(model, images, labels, settings.attack, generator)
            return F.cross_entropy(model(images), labels)

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
        "train_images": len(data),
        "unreadable_images": data.num_unreadable,
        **validation_metrics(model, settings.validation, settings.image_size, device),
    }
    if settings.adversarial:
        metrics |= attacked_metrics(model, settings.validation, settings.attack, settings.image_size, device)
    content = {
        "settings": settings.model_dump(mode="json", exclude={"config", "output"}),
        "metrics": metrics,
        **initial,
    }
    save_target(settings.output, model, config, data.class_names, content)
    return metrics


def _config_of(settings: TrainTargetSettings, num_classes: int) -> TargetConfig:
    large = settings.image_size > LARGE_IMAGE and settings.architecture in NETWORKS
    return TargetConfig(
        architecture=settings.architecture,
        num_classes=num_classes,
        width=settings.width,
        image_size=settings.image_size,
        stem_stride=settings.stem_stride or (2 if large else 1),
        mean=settings.mean,
        std=settings.std,
    )


def _attacked(
    model: nn.Module, images: Tensor, labels: Tensor, attack: InnerAttack, generator: torch.Generator
) -> Tensor:
    # Evaluation mode: the attack must not move the batch statistics it is crafted against.
    model.eval()
    adversarial = pgd(
        model,
        images,
        labels,
        threat=ThreatModel(attack.norm, attack.epsilon),
        steps=attack.steps,
        step_size=attack.step_size,
        generator=generator,
    )
    model.train()
    return adversarial


def _initialize(model: nn.Module, config: TargetConfig, weights: Path | None) -> dict[str, Any]:
    if weights is None:
        return {}
    if weights.is_dir():
        manifest = load_artifact(weights, artifact_kind(weights) or "target")
        _check_normalization(config, manifest.get("target", {}), weights)
    path = weights / WEIGHTS if weights.is_dir() else weights
    tensors = load_tensors(path)
    # Files of others hold the bare network; ours has its normalisation in front.
    if isinstance(model, Normalized) and not any(name.startswith("network.") for name in tensors):
        tensors = {f"network.{name}": tensor for name, tensor in tensors.items()}
    fresh = initialize_weights(model, tensors)
    return {"init_weights_digest": file_digest(path), "fresh_layers": fresh}


def _check_normalization(config: TargetConfig, described: Mapping[str, Any], origin: Path) -> None:
    # Weights behind another normalisation would start from shifted features, and nothing would show it.
    for name in ("mean", "std"):
        theirs = tuple(described.get(name, getattr(config, name)))
        if theirs != getattr(config, name):
            values = " ".join(map(str, theirs))
            raise TargetError(f"weights of {origin} were trained with --{name} {values}; give the same")
