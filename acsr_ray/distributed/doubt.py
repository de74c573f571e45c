"""The job that calibrates doubt: labelled images, clean and attacked, purified and judged in Ray tasks.

Every unit is a chunk of images under one attack, a file named by the digest of what decided it below
`OUTPUT/units`, so a killed job goes on where it stopped.
"""

import logging
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import torch
from pydantic import Field

from acsr_ray.artifacts import atomic_write, json_digest
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.config import ConfigError, Device, JobSettings, did_you_mean
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.distributed.sweep import parquet_bytes
from acsr_ray.distributed.unit_runner import UnitRunner
from acsr_ray.evaluation.cells import Chunk, fingerprint
from acsr_ray.evaluation.doubt_fit import DoubtError, fit_logistic
from acsr_ray.evaluation.doubt_report import doubt_report
from acsr_ray.evaluation.doubt_samples import (
    CLEAN,
    TRAFFIC_ATTACKS,
    Samples,
    collect_samples,
    observe,
)
from acsr_ray.evaluation.doubt_scores import DoubtScores, risk_at, score_doubt
from acsr_ray.evaluation.grid import EvaluationData
from acsr_ray.evaluation.plan import EvaluationSet, load_set
from acsr_ray.models.targets import absolute_location
from acsr_ray.purification.bundle import (
    ALGORITHM_VERSION,
    DEFAULT_BUNDLE,
    bundle_digest,
    find_bundle,
)
from acsr_ray.purification.doubt import DoubtModel, save_doubt
from acsr_ray.purification.judge import OWN_CLASSES, Judge, load_judge
from acsr_ray.purification.options import PurifyOptions, Reconstruction, Strength
from acsr_ray.purification.purifier import Purifier

logger = logging.getLogger(__name__)

REPORT = "report.html"
UNITS = "units"
CHUNK = 50
"""Images per unit."""
DOUBT_VERSION = 1
"""Raised when the same unit would give other rows."""


class CalibrateDoubtSettings(JobSettings):
    """Calibrate doubt: how likely a classifier is wrong on an image that a bundle purified.

    purify_corpus --doubt OUTPUT then adds the column acsr_doubt, by which images are routed to people.
    """

    bundle: str = DEFAULT_BUNDLE
    """What purifies: a bundle's directory, or the name of a packaged one."""
    reconstruction: Reconstruction | None = None
    """`cbpdn`, the paper's, or `unrolled`, trained on attacks; None: the bundle's default."""
    strength: Strength | None = None
    """Factor on what is taken away, or `auto`, as for purify_corpus; None: the bundle's default."""
    top_k: int = Field(1, ge=1)
    """Reconstruct with so many nearest clusters and average."""
    target: str | None = None
    """Classifier whose mistakes are to be found: an artifact of train_target, a TorchScript file or
    package.module:factory. Default: the class layer of the bundle's encoder."""
    validation: tuple[str, ...] = Field(min_length=1)
    """Labelled shards like the traffic to come, which neither bundle nor classifier was trained on."""
    images: int = Field(2000, ge=20)
    """Most images; doubt is fitted on one half and measured on the other."""
    image_size: int | None = Field(None, ge=8)
    """Side in pixels that images are resized to before they are attacked and purified; default: what the
    classifier says of itself, else what the encoder sees. Doubt holds for images of about that size."""
    attacks: tuple[str, ...] = Field(("bim-l2-0.01", "bim-l2-0.04", "pgd-linf-8", "cw"), min_length=1)
    """Attacks in the traffic, all equally frequent: of these and fgsm-linf-4, pgd-linf-4, deepfool,
    square-linf-8."""
    prevalence: float = Field(0.1, gt=0, lt=1)
    """Share of the traffic that is attacked."""
    output: Path
    """Folder of the doubt model, its report and the units; on storage that all nodes share."""
    seed: int = 0
    """Of the choice of images, of the halves and of the attacks."""
    task_cpus: float = Field(1.0, gt=0)
    """CPUs of a unit; it uses as many threads, at least one."""
    task_gpus: float = Field(0.25, gt=0, le=1)
    """GPU share of a unit, where there are GPUs."""
    device: Device = "auto"
    """Where units compute; auto takes the cluster's GPUs if there are any."""
    ray: RaySettings = RaySettings()
    """Where Ray runs."""

    @property
    def options(self) -> PurifyOptions:
        """How to purify."""
        return PurifyOptions(reconstruction=self.reconstruction, strength=self.strength, top_k=self.top_k)


def calibrate_doubt(settings: CalibrateDoubtSettings) -> dict[str, Any]:
    """Fit doubt, save it with its report and return what it is worth on held-out images.

    Raises:
        ConfigError: no such attack.
        ArtifactError: no such bundle, or no such reconstruction in it.
        TargetError: no target there.
        DoubtError: images on which the classifier is never or always wrong, or with labels it has no
            class for.
        SweepError: some units failed.
    """
    attacks = _attacks(settings)
    purifier, judge = _load(settings, "cpu")
    size = settings.image_size or judge.image_size
    data = EvaluationData(
        name="validation", test=settings.validation, image_size=size, images=settings.images
    )
    loaded = load_set(data, "test", settings.seed, CHUNK)
    _check_labels(loaded, judge)
    samples = _observe(settings, attacks, purifier, judge, loaded)
    fitted, held_out = samples.halves(settings.seed)
    logistic = fit_logistic(fitted.features, fitted.wrong, fitted.weights(settings.prevalence))
    scores = score_doubt(logistic, fitted, held_out, settings.prevalence)
    model = DoubtModel(
        bundle=bundle_digest(settings.bundle),
        options=purifier.options,
        classifier=judge.digest,
        image_size=judge.image_size,
        logistic=logistic,
    )
    page = doubt_report(f"Doubt with {purifier.config.name}", _about(settings, model, size), scores, logistic)
    # The model last: when it is there, so is its report.
    atomic_write(settings.output / REPORT, page.encode())
    content = {
        "validation_digest": json_digest(list(loaded.digests)),
        "images": {"fitted": fitted.num_images, "held_out": held_out.num_images, "side": size},
        "attacks": {name: attack.describe() for name, attack in attacks.items() if attack},
        "prevalence": settings.prevalence,
        "metrics": _metrics(scores),
    }
    save_doubt(settings.output, model, content)
    return _summary(settings, scores)


def _attacks(settings: CalibrateDoubtSettings) -> dict[str, AttackConfig | None]:
    for name in settings.attacks:
        if name not in TRAFFIC_ATTACKS:
            raise ConfigError(f"no attack {name!r}{did_you_mean(name, list(TRAFFIC_ATTACKS))}")
    return {CLEAN: None, **{name: TRAFFIC_ATTACKS[name] for name in settings.attacks}}


def _load(settings: CalibrateDoubtSettings, device: str) -> tuple[Purifier, Judge]:
    """Load purifier and classifier, once per process."""
    target = None if settings.target is None else absolute_location(settings.target)
    return _loaded(
        str(find_bundle(settings.bundle)),
        settings.options.model_dump_json(),
        target,
        settings.image_size,
        device,
    )


@lru_cache(maxsize=2)
def _loaded(
    bundle: str, options: str, target: str | None, size: int | None, device: str
) -> tuple[Purifier, Judge]:
    purifier = Purifier.load(bundle, device, PurifyOptions.model_validate_json(options))
    return purifier, load_judge(purifier, target, size)


def _check_labels(loaded: EvaluationSet, judge: Judge) -> None:
    side = judge.image_size
    with torch.no_grad():
        classes = judge(torch.zeros(1, 3, side, side)).shape[1]
    highest = max(int(chunk.labels.max()) for chunk in loaded.chunks)
    if highest >= classes:
        raise DoubtError(f"labels go up to {highest}, but the classifier has {classes} classes")


def _observe(
    settings: CalibrateDoubtSettings,
    attacks: dict[str, AttackConfig | None],
    purifier: Purifier,
    judge: Judge,
    loaded: EvaluationSet,
) -> Samples:
    """Run what is not there yet of every chunk under every attack, and return all rows."""
    basis = [
        DOUBT_VERSION,
        ALGORITHM_VERSION,
        bundle_digest(settings.bundle),
        purifier.options.describe(),
        judge.digest,
        judge.image_size,
        settings.seed,
    ]
    keys = {
        (name, number): fingerprint([*basis, digest, attack.identity() if attack else None])
        for name, attack in attacks.items()
        for number, digest in enumerate(loaded.digests)
    }
    wanted = {key: entry for entry, key in keys.items()}
    # Workers have other working directories.
    settings = settings.model_copy(
        update={
            "bundle": str(find_bundle(settings.bundle)),
            "target": settings.target and absolute_location(settings.target),
        }
    )
    with ray_session(settings.ray):
        runner = UnitRunner(
            settings.output,
            settings.device,
            task_cpus=settings.task_cpus,
            task_gpus=settings.task_gpus,
            folders=(UNITS,),
        )
        paths = {key: runner.cache / UNITS / f"{key}.parquet" for key in wanted}

        def submit(key: str) -> "ray.ObjectRef[Any]":
            name, number = wanted[key]
            return runner.task(_observe_task).remote(
                settings, loaded.chunks[number], attacks[name], runner.device, runner.threads
            )

        runner.run("images", list(wanted), paths.__getitem__, submit)
    tables = {
        name: [pq.read_table(paths[keys[name, number]]) for number in range(len(loaded.chunks))]
        for name in attacks
    }
    return collect_samples(tables)


def _observe_task(
    settings: CalibrateDoubtSettings, chunk: Chunk, attack: AttackConfig | None, device: str, threads: int
) -> bytes:
    torch.set_num_threads(threads)
    return parquet_bytes(observe(chunk, attack, *_load(settings, device), settings.seed))


def _about(settings: CalibrateDoubtSettings, model: DoubtModel, size: int) -> str:
    classifier = "the bundle's own classes" if model.classifier == OWN_CLASSES else settings.target
    options = ", ".join(f"{name} {value}" for name, value in model.options)
    return (
        f"How likely {classifier} is wrong on an image that {settings.bundle} purified ({options}); images "
        f"of {size} x {size} pixels, clean and under {', '.join(settings.attacks)} of an attacker who knows "
        "the classifier and not the purifier, rounded to 8 bits. Fitted on one half, measured on the other."
    )


def _metrics(scores: DoubtScores) -> dict[str, Any]:
    return {
        "brier": scores.brier,
        "expected_calibration_error": scores.calibration_error,
        "auroc_wrong": scores.auroc_wrong,
        "auroc_attacked": scores.auroc_attacked,
        "aurc": {name: curve.aurc for name, curve in scores.curves.items()},
        "aurc_gain": asdict(scores.gain),
        "thresholds": [asdict(threshold) for threshold in scores.thresholds],
    }


def _summary(settings: CalibrateDoubtSettings, scores: DoubtScores) -> dict[str, Any]:
    left = {
        name: {f"{share:.0%}": str(risk_at(curve, share, scores.images)) for share in (1.0, 0.95, 0.9)}
        for name, curve in scores.curves.items()
        if name != "random"
    }
    gain = scores.gain
    return {
        "held-out images": scores.images,
        "errors left, doubt": left["doubt"],
        "errors, confidence": left["confidence"],
        "AURC gained": f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]",
        "AUROC, wrong": round(scores.auroc_wrong["doubt"], 3),
        "AUROC, attacked": round(scores.auroc_attacked["doubt"], 3),
        "calibration error": round(scores.calibration_error, 4),
        "Brier score": round(scores.brier, 4),
        "output": str(settings.output),
        "report": str(settings.output / REPORT),
    }
