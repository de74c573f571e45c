"""The job that fine-tunes a target on purified shards and reports how strong a purifier it then bears."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from acsr_ray.artifacts import artifact_kind, atomic_write, begin_artifact, json_digest, load_artifact
from acsr_ray.columns import STATUS
from acsr_ray.corpus.containers import open_parquet
from acsr_ray.corpus.images import Pixels
from acsr_ray.corpus.labelled import (
    label_names,
    numbered_names,
    parquet_shards,
    read_labelled,
    sample_rows,
)
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.latents import TRAINING_DATA
from acsr_ray.distributed.runtime import GPU_DEVICE, check_task, ray_session, takes_gpus
from acsr_ray.distributed.trainer import run_training
from acsr_ray.distributed.training import TrainSettings
from acsr_ray.evaluation.finetuning import (
    GrayBoxAttack,
    Outcomes,
    borne_line,
    compare_classifiers,
    finetuning_markdown,
    finetuning_tables,
    purifier_at,
    strongest_borne,
)
from acsr_ray.models.classifier import EncoderConfig
from acsr_ray.models.targets import Target, TargetConfig, TargetError, load_target, save_target
from acsr_ray.purification.bundle import DEFAULT_BUNDLE, bundle_digest, load_bundle
from acsr_ray.purification.options import PurifyOptions, Reconstruction, Strength
from acsr_ray.training.loop import OptimizerConfig, resolve_device
from acsr_ray.training.shards import TrainingShards, plan_training
from acsr_ray.training.target import TargetTraining, weights_digest

REPORT = "report.md"


class FinetuneTargetSettings(TrainSettings):
    """Fine-tune a target on purified shards; write it and a report of what it bears before and after."""

    train: tuple[str, ...] = Field(min_length=1)
    """Shards that jobs/purify_corpus.py wrote, its OUTPUT/data; quarantined rows are left out."""
    original: tuple[str, ...] = ()
    """Shards that were not purified, mixed in so that the classifier keeps what it knew; default: none."""
    validation: tuple[str, ...] = Field(min_length=1)
    """Shards that were not purified and not trained on, for the report."""
    target: Path
    """Classifier to start from: an artifact of train_target, finetune_target, train_baseline or train_robust,
    or a safetensors file, which `network` describes."""
    network: TargetConfig = TargetConfig()
    """Network of a safetensors file; an artifact knows its own."""
    output: Path
    """Folder of the artifact (`target/`) and its report.md."""
    bundle: str = DEFAULT_BUNDLE
    """Purifier of the report: a bundle's directory, or the name of a packaged one."""
    reconstruction: Reconstruction | None = None
    """How it purifies: `cbpdn` or `unrolled`; default: as the bundle says."""
    top_k: int = Field(1, ge=1)
    """Clusters that it reconstructs with and averages."""
    strengths: tuple[Strength, ...] = Field((1.0, 1.4), min_length=1)
    """Strengths of the purifier, as for purify_corpus, at which the classifier is measured. `auto` has no
    place in the order that the report's answer is about."""
    attack: GrayBoxAttack = GrayBoxAttack()
    """Attack of the report, on the bare classifier."""
    validation_images: int = Field(1000, ge=1)
    """Most images of the report; each is purified three times per strength."""
    optimizer: OptimizerConfig = OptimizerConfig(epochs=2, peak_lr=0.01)
    """Schedule and optimiser."""
    seed: int = 0
    """Fixes shuffling and augmentation."""


def finetune_target(settings: FinetuneTargetSettings) -> dict[str, Any]:
    """Fine-tune a target, save it as artifact `target` with a report, and return the report's rows.

    Raises:
        TargetError: a target that cannot be trained, or shards of other classes than it has.
        CorpusError: shards to train on that were not purified, or others that were; no readable shard.
        ArtifactError: target or bundle are absent or were changed.
    """
    target, config = load_start(settings)
    load_bundle(settings.bundle).config.with_reconstruction(settings.reconstruction)
    names = target.class_names or numbered_names(config.num_classes)
    _check_shards(settings.train, names, purified=True)
    _check_shards((*settings.original, *settings.validation), names, purified=False)
    pixels, labels = _read_held_out(settings, config)
    shards = plan_training((*settings.train, *settings.original), settings.optimizer.lanes, purified=True)
    _check_labels(len(shards.class_names), config, "training shards")
    training = TargetTraining(
        target=config,
        optimizer=settings.optimizer,
        seed=settings.seed,
        attack=None,
        init=str(settings.target.resolve()),
        init_digest=weights_digest(settings.target),
    )
    trained = run_training(
        training,
        shards,
        validation=settings.validation,
        output=settings.output,
        device=settings.device,
        run=settings.run,
        settings=settings.ray,
    )
    model = training.build()
    model.load_state_dict(trained.weights)
    after = model.requires_grad_(False).eval()
    outcomes = _compare(target.model, after, pixels, labels, settings)
    metrics = {
        "train_images": shards.num_rows,
        "original_images": _rows_of(shards, settings.original),
        **trained.metrics,
        "borne_strength": strongest_borne(outcomes),
        "outcomes": [found.describe() for found in outcomes],
    }
    content = {
        TRAINING_DATA: json_digest(sorted({unit.content for unit in shards.units})),
        "settings": settings.deciding(),
        "target_digest": target.digest,
        "bundle_digest": bundle_digest(settings.bundle),
        "metrics": metrics,
    }
    report = finetuning_markdown(
        outcomes, _purifier_name(settings), settings.attack, _facts(settings, metrics)
    )
    # The manifest comes last, so a target that is there has its report.
    begin_artifact(settings.output)
    atomic_write(settings.output / REPORT, report.encode())
    save_target(settings.output, model, config, names, content)
    return _summary(settings, outcomes, metrics)


def load_start(settings: FinetuneTargetSettings) -> tuple[Target, TargetConfig]:
    """Load the target to start from, with what it takes to build it anew.

    Raises:
        TargetError: something that cannot be trained here, or settings that would be ignored.
        ArtifactError: an artifact of another kind or whose bytes changed, or weights that do not fit.
    """
    location, described = settings.target, settings.network
    if location.resolve() == settings.output.resolve():
        raise TargetError(f"{location} is the target to start from; choose another --output")
    if location.suffix == ".safetensors":
        return load_target(str(location), config=described), described
    if not location.is_dir():
        raise TargetError(
            f"cannot fine-tune {str(location)!r}: --target takes a folder of train_target, finetune_target, "
            "train_baseline or train_robust, or a .safetensors file of one of its networks (--network.*)"
        )
    if described != TargetConfig():
        raise TargetError(f"--network is for safetensors files; {location} knows its own network")
    target, kind = load_target(str(location)), artifact_kind(location) or "target"
    manifest = load_artifact(location, kind)
    if kind == "target":
        return target, TargetConfig.from_description(manifest["target"])
    encoder = EncoderConfig.from_description(manifest["encoder"])
    config = TargetConfig(
        architecture=encoder.architecture, num_classes=encoder.num_classes, image_size=encoder.image_size
    )
    return target, config


def _check_shards(locations: Sequence[str], class_names: tuple[str, ...], *, purified: bool) -> None:
    for uri in parquet_shards(locations):
        with open_parquet(uri) as file:
            schema = file.schema_arrow
        if purified and STATUS not in schema.names:
            raise CorpusError(f"{uri} was not purified: --train takes OUTPUT/data of jobs/purify_corpus.py")
        if not purified and STATUS in schema.names:
            raise CorpusError(f"{uri} was purified: --original and --validation take shards as they were")
        names = label_names(schema)
        # A target whose classes are only numbered goes with any names, if there are as many.
        known = numbered_names(len(names)) if class_names == numbered_names(len(class_names)) else names
        if names and known != class_names:
            raise TargetError(
                f"{uri} has classes {', '.join(names)}; the target has {', '.join(class_names)}"
            )


def _check_labels(num_classes: int, config: TargetConfig, origin: str) -> None:
    if num_classes > config.num_classes:
        raise TargetError(f"{origin} have {num_classes} classes, the target has {config.num_classes}")


def _read_held_out(
    settings: FinetuneTargetSettings, config: TargetConfig
) -> tuple[Pixels, NDArray[np.int64]]:
    images = read_labelled(settings.validation, config.image_size)
    _check_labels(int(images.labels.max()) + 1, config, "validation shards")
    chosen = sample_rows(len(images), settings.validation_images)
    return images.pixels[chosen], images.labels[chosen]


def _compare(
    before: nn.Module,
    after: nn.Module,
    pixels: Pixels,
    labels: NDArray[np.int64],
    settings: FinetuneTargetSettings,
) -> tuple[Outcomes, ...]:
    """Measure both classifiers: in this process if training was there, else in a task like its workers."""
    # Workers have other working directories.
    bundle = str(Path(settings.bundle).resolve()) if Path(settings.bundle).is_dir() else settings.bundle
    options = PurifyOptions(reconstruction=settings.reconstruction, top_k=settings.top_k)
    arguments = (before, after, pixels, labels)
    named: dict[str, Any] = {
        "purifier": partial(purifier_at, bundle, options),
        "strengths": settings.strengths,
        "threat": settings.attack.threat,
    }
    if settings.run.workers == 0:
        return compare_classifiers(*arguments, **named, device=resolve_device(settings.device))
    with ray_session(settings.ray):
        on_gpu = takes_gpus(settings.device)
        cpus = settings.run.cpus_per_worker or 1.0
        gpus = (settings.run.gpus_per_worker or 1.0) if on_gpu else 0.0
        check_task("measuring a target", cpus, gpus)
        task: Any = ray.remote(cast(Any, compare_classifiers)).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=3
        )
        device = GPU_DEVICE if on_gpu else "cpu"
        found: tuple[Outcomes, ...] = ray.get(task.remote(*arguments, **named, device=device))
        return found


def _rows_of(shards: TrainingShards, locations: Sequence[str]) -> int:
    uris = set(parquet_shards(locations))
    return sum(unit.num_rows for unit in shards.units if unit.uri in uris)


def _purifier_name(settings: FinetuneTargetSettings) -> str:
    config = load_bundle(settings.bundle).config.with_reconstruction(settings.reconstruction)
    clusters = f", {settings.top_k} clusters" if settings.top_k > 1 else ""
    return f"{config.name} ({config.reconstruction}{clusters})"


def _facts(settings: FinetuneTargetSettings, metrics: dict[str, Any]) -> dict[str, object]:
    return {
        "started from": settings.target,
        "training images": f"{metrics['train_images']}, {metrics['original_images']} of them not purified",
        "left out because unreadable or quarantined": metrics["unreadable_images"],
        "epochs": settings.optimizer.epochs,
    }


def _summary(
    settings: FinetuneTargetSettings, outcomes: Sequence[Outcomes], metrics: dict[str, Any]
) -> dict[str, Any]:
    shown = {name: value for name, value in metrics.items() if name not in ("outcomes", "borne_strength")}
    tables = finetuning_tables(outcomes, _purifier_name(settings), settings.attack)
    rows = {f"{table.title}, {row[0]}": " | ".join(row[1:]) for table in tables for row in table.rows}
    return {**shown, **rows, "report": str(settings.output / REPORT), "answer": borne_line(outcomes)}
