"""The training jobs: settings, what they train, and the artifact that they leave."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from acsr_ray.artifacts import ArtifactError, artifact_digest, json_digest, load_artifact
from acsr_ray.config import Device, JobSettings
from acsr_ray.distributed.latents import TRAINING_DATA
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.distributed.trainer import Trained, run_training
from acsr_ray.models.classifier import EncoderConfig, load_classifier, save_classifier
from acsr_ray.models.targets import (
    DEFAULT_MEAN,
    DEFAULT_STD,
    NETWORKS,
    Channels,
    PositiveChannels,
    TargetConfig,
    TargetError,
    build_target,
    save_target,
)
from acsr_ray.models.wide_resnet import WideResNet
from acsr_ray.training.baseline import BaselineTraining
from acsr_ray.training.loop import OptimizerConfig
from acsr_ray.training.objectives import InnerAttack
from acsr_ray.training.robust import Method, RobustTraining
from acsr_ray.training.run import Training
from acsr_ray.training.settings import RunSettings
from acsr_ray.training.shards import TrainingShards, plan_training
from acsr_ray.training.target import TargetTraining, weights_digest

LARGE_IMAGE = 48
"""Above this side, a target's first convolution gets stride 2 unless told otherwise."""


class TrainSettings(JobSettings):
    """What every training job takes."""

    train: tuple[str, ...] = Field(min_length=1)
    """Training shards: Parquet files or folders with columns `image` and `label`."""
    validation: tuple[str, ...] = ()
    """Validation shards; the closing metrics are measured there."""
    device: Device = "auto"
    """Where to train; auto takes the cluster's GPUs if it has some."""
    run: RunSettings = RunSettings()
    """Workers, checkpoints and retries."""
    ray: RaySettings = RaySettings()
    """Where Ray runs and how much of it to take."""


class TrainBaselineSettings(TrainSettings):
    """Train the baseline f_bsl (stage i) on labelled Parquet shards and write it as an artifact."""

    output: Path
    """Folder of the artifact (`baseline/`)."""
    architecture: str = "wrn-16-4"
    """wrn-16-2, wrn-16-4 for CPUs; wrn-28-4, wrn-28-10, wrn-34-10 (paper) for GPUs.

    Append `-s2` at 64 pixels and `-s4` from 128 to 224, the stride of the first convolution, and `-gn` for
    GroupNorm, with which several CPU workers make the run of one.
    """
    image_size: int = Field(32, ge=8)
    """Side in pixels of the square that the network sees."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Schedule and optimiser."""
    seed: int = 0
    """Fixes initialisation, shuffling and augmentation."""


class TrainRobustSettings(TrainSettings):
    """Train the robust encoder f_rob (stage ii, RST) and write it as an artifact."""

    baseline: Path
    """Artifact of train_baseline: architecture, and weights when `init` is baseline."""
    semantics: Path
    """Artifact of learn_semantics: each image's cluster and the clusters' Gaussians."""
    output: Path
    """Folder of the artifact (`robust/`)."""
    init: Literal["baseline", "random"] | Path = "baseline"
    """Starting weights: `baseline`, `random`, or the folder of another artifact of train_robust."""
    method: Method = "rst"
    """`rst`, which is adversarial training with alpha 0, or `trades`."""
    alpha: float = Field(0.1, ge=0)
    """rst: weight of the latent distance; 0 is plain adversarial training."""
    beta: float = Field(6.0, ge=0)
    """trades: weight of the divergence."""
    attack: InnerAttack = InnerAttack()
    """Inner maximisation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Schedule and optimiser."""
    seed: int = 1
    """Fixes initialisation, shuffling, augmentation and attacks."""


class TrainTargetSettings(TrainSettings):
    """Train a target classifier on labelled Parquet shards and write it as an artifact."""

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
    seed: int = 0
    """Fixes initialisation, shuffling, augmentation and attacks."""


def train_baseline(settings: TrainBaselineSettings) -> dict[str, Any]:
    """Train f_bsl, save it as artifact `baseline` and return its closing metrics."""
    shards = plan_training(settings.train, settings.optimizer.lanes)
    encoder = EncoderConfig(
        architecture=settings.architecture,
        num_classes=len(shards.class_names),
        image_size=settings.image_size,
    )
    training = BaselineTraining(encoder=encoder, optimizer=settings.optimizer, seed=settings.seed)
    trained = _train(training, shards, settings)
    content = _content(settings, trained, shards, {"train_images": shards.num_rows})
    _save_encoder(settings.output, "baseline", training, encoder, trained, shards.class_names, content)
    return content["metrics"]


def train_robust(settings: TrainRobustSettings) -> dict[str, Any]:
    """Train f_rob, save it as artifact `robust` and return its closing metrics."""
    baseline = load_classifier(settings.baseline, "baseline")
    semantics = load_artifact(settings.semantics, "semantics")
    if semantics["baseline_digest"] != artifact_digest(settings.baseline):
        raise ArtifactError(f"{settings.semantics} was not made from {settings.baseline}")
    init = settings.baseline if settings.init == "baseline" else settings.init
    if isinstance(init, Path) and init != settings.baseline:
        load_classifier(init, "robust")
    shards = plan_training(settings.train, settings.optimizer.lanes)
    training = RobustTraining(
        encoder=baseline.config,
        optimizer=settings.optimizer,
        seed=settings.seed,
        method=settings.method,
        attack=settings.attack,
        alpha=settings.alpha,
        beta=settings.beta,
        init=None if init == "random" else str(Path(init).resolve()),
        init_digest=None if init == "random" else artifact_digest(Path(init)),
        semantics=str(settings.semantics.resolve()),
        semantics_digest=artifact_digest(settings.semantics),
    )
    trained = _train(training, shards, settings)
    content = _content(settings, trained, shards, {"inner attack": settings.attack.kind})
    content |= {
        "baseline_digest": artifact_digest(settings.baseline),
        "semantics_digest": artifact_digest(settings.semantics),
        "init_digest": training.init_digest,
    }
    _save_encoder(
        settings.output, "robust", training, baseline.config, trained, baseline.class_names, content
    )
    return content["metrics"]


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
        build_target(_target_config(settings, 2))
    shards = plan_training(settings.train, settings.optimizer.lanes)
    if len(shards.class_names) < 2:
        raise TargetError(
            f"a classifier needs two classes, the training shards have {len(shards.class_names)}"
        )
    weights = settings.init_weights
    training = TargetTraining(
        target=_target_config(settings, len(shards.class_names)),
        optimizer=settings.optimizer,
        seed=settings.seed,
        attack=settings.attack if settings.adversarial else None,
        init=None if weights is None else str(weights.resolve()),
        init_digest=None if weights is None else weights_digest(weights),
    )
    model, fresh = training.initialized()
    trained = _train(training, shards, settings)
    model.load_state_dict(trained.weights)
    content = _content(settings, trained, shards, {"train_images": shards.num_rows})
    if weights is not None:
        content |= {"init_weights_digest": training.init_digest, "fresh_layers": fresh}
    save_target(settings.output, model, training.target, shards.class_names, content)
    return content["metrics"]


def _train(
    training: Training,
    shards: TrainingShards,
    settings: TrainBaselineSettings | TrainRobustSettings | TrainTargetSettings,
) -> Trained:
    return run_training(
        training,
        shards,
        validation=settings.validation,
        output=settings.output,
        device=settings.device,
        run=settings.run,
        settings=settings.ray,
    )


def _content(
    settings: TrainBaselineSettings | TrainRobustSettings | TrainTargetSettings,
    trained: Trained,
    shards: TrainingShards,
    counted: dict[str, Any],
) -> dict[str, Any]:
    return {
        TRAINING_DATA: json_digest(sorted({unit.content for unit in shards.units})),
        "settings": settings.deciding(),
        "metrics": {**counted, **trained.metrics},
    }


def _save_encoder(
    output: Path,
    kind: str,
    training: Training,
    encoder: EncoderConfig,
    trained: Trained,
    class_names: tuple[str, ...],
    content: dict[str, Any],
) -> None:
    model = training.build()
    assert isinstance(model, WideResNet)
    model.load_state_dict(trained.weights)
    save_classifier(output, kind, model, encoder, class_names, content)


def _target_config(settings: TrainTargetSettings, num_classes: int) -> TargetConfig:
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
