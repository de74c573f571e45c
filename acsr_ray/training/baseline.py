"""Stage i, step 1: the baseline `f_bsl`, a WideResNet trained with cross-entropy on clean images (Eq. 1)."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from acsr_ray.config import Device, JobSettings
from acsr_ray.corpus.labelled import LabelledImages, read_labelled
from acsr_ray.models.classifier import EncoderConfig, save_classifier
from acsr_ray.models.wide_resnet import build_wide_resnet
from acsr_ray.training.loop import (
    EpochStats,
    OptimizerConfig,
    accuracy,
    fit,
    predict,
    resolve_device,
)

logger = logging.getLogger(__name__)


class TrainBaselineSettings(JobSettings):
    """Train the baseline f_bsl (stage i) on labelled Parquet shards and write it as an artifact."""

    train: tuple[str, ...] = Field(min_length=1)
    """Training shards: Parquet files or folders with columns `image` and `label`."""
    validation: tuple[str, ...] = ()
    """Validation shards; the closing accuracy is measured there."""
    output: Path
    """Folder of the artifact (`baseline/`)."""
    architecture: str = "wrn-16-4"
    """`wrn-DEPTH-WIDTH`: wrn-16-4 for CPUs; wrn-28-4, wrn-28-10, wrn-34-10 (the paper's) for GPUs."""
    image_size: int = Field(32, ge=8)
    """Side in pixels of the square that the network sees."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Schedule and optimiser."""
    device: Device = "auto"
    """Where to train; auto takes a GPU if there is one."""
    seed: int = 0
    """Fixes initialisation, shuffling and augmentation."""


def train_baseline(settings: TrainBaselineSettings) -> dict[str, Any]:
    """Train f_bsl, save it as artifact `baseline` and return its closing metrics."""
    data = read_labelled(settings.train, settings.image_size)
    config = EncoderConfig(
        architecture=settings.architecture,
        num_classes=len(data.class_names),
        image_size=settings.image_size,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = build_wide_resnet(config.architecture, config.num_classes)
    device = resolve_device(settings.device)
    fit(
        model,
        data.pixels,
        data.labels,
        lambda images, labels, _: F.cross_entropy(model(images), labels),
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
    content = {
        "settings": settings.model_dump(mode="json", exclude={"config", "output"}),
        "metrics": metrics,
    }
    save_classifier(settings.output, "baseline", model, config, data.class_names, content)
    return metrics


def validation_metrics(
    model: torch.nn.Module, shards: tuple[str, ...], image_size: int, device: str
) -> dict[str, Any]:
    """Return the accuracy on validation shards; {} when there are none."""
    if not shards:
        return {}
    held_out: LabelledImages = read_labelled(shards, image_size)
    logits = predict(model, held_out.pixels, device)
    return {
        "validation_images": len(held_out),
        "validation_accuracy": accuracy(logits, held_out.labels),
    }


def log_epoch(stats: EpochStats) -> None:
    """Log one epoch's loss and time."""
    logger.info("epoch %d: loss %.4f, %.0f s", stats.epoch, stats.loss, stats.elapsed_s)
