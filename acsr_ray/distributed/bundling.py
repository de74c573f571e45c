"""Put semantics and the robust encoder together as a bundle, choosing on the validation split.

Chosen there, never on test images: whether the clusters' Gaussians stay those of f_bsl or are refitted on
the latents of f_rob (same assignments), and how clusters are compared at inference. The measure is the share
of validation images, clean and attacked, whose selected cluster belongs to their class.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from pydantic import Field

from acsr_ray.artifacts import ArtifactError, artifact_digest, atomic_write, json_digest, load_artifact
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.clustering.gaussians import GaussianMoments, Gaussians
from acsr_ray.clustering.selection import RULES, SelectionRule
from acsr_ray.config import Device, JobSettings
from acsr_ray.distributed.encoding import cluster_moments, start_attack
from acsr_ray.distributed.latents import TRAINING_DATA, labelled_data_digest
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.distributed.semantics import load_semantics_dictionaries
from acsr_ray.evaluation.bundle_report import Measured, bundle_report
from acsr_ray.evaluation.selection_quality import HeldOutLatents, selection_outcome
from acsr_ray.models.classifier import Classifier, load_classifier
from acsr_ray.purification.bundle import Bundle, BundleConfig, save_bundle
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.tikhonov import TikhonovConfig

logger = logging.getLogger(__name__)

Origin = Literal["baseline", "robust"]
ENCODERS: dict[Origin, str] = {"baseline": "f_bsl", "robust": "f_rob"}
REPORT = "report.html"


class BuildBundleSettings(JobSettings):
    """Build a bundle from the artifacts of stages i and ii."""

    name: str
    """Name recorded in the bundle."""
    baseline: Path
    """Artifact of train_baseline."""
    semantics: Path
    """Artifact of learn_semantics."""
    robust: Path
    """Artifact of train_robust."""
    output: Path
    """Folder of the bundle."""
    class_names: tuple[str, ...] = ()
    """Names of the classes by id; default: those of the baseline's shards, or numbers."""
    validation: tuple[str, ...] = ()
    """Validation shards, on which everything `auto` is chosen."""
    validation_images: int = Field(2000, ge=1)
    """Most validation images used for the choice."""
    gaussians: Literal["baseline", "robust", "auto"] = "auto"
    """Latents that the clusters' Gaussians are fitted on; `baseline` is the paper's."""
    selection: SelectionRule | Literal["auto"] = "auto"
    """How clusters are compared; `mahalanobis` is the paper's."""
    half_precision: bool = False
    """Store encoder weights and whitenings in half precision, in half the space."""
    cbpdn: CbpdnConfig = CbpdnConfig()
    """Sparse coding at inference; lmbda as in the dictionaries."""
    task_gpus: float = Field(0.5, gt=0)
    """GPU share of the task that attacks validation images, where there are GPUs."""
    device: Device = "auto"
    """Where latents are computed and validation images attacked."""
    ray: RaySettings = RaySettings()
    """Where Ray runs and how much of it to take."""


def build_bundle(settings: BuildBundleSettings) -> dict[str, Any]:
    """Choose what is left open, write the bundle and its report; return what was chosen and measured.

    Raises:
        ArtifactError: artifacts that do not belong together, or `auto` without validation shards.
    """
    semantics = load_artifact(settings.semantics, "semantics")
    robust = load_classifier(settings.robust, "robust")
    _check(settings, semantics, robust)
    names = settings.class_names or robust.class_names
    keys, atoms = load_semantics_dictionaries(settings.semantics)
    threat = _threat(robust)
    moments, held_out = _gather(settings, threat)
    for own in moments.values():
        if [tuple(key) for key in own.keys.tolist()] != keys:
            raise ArtifactError("the semantics' dictionaries and clusters do not match")
    fitted = {
        (origin, rule): _stored(own.finish(semantics["settings"]["inverse"], tied=rule == "tied"), settings)
        for origin, own in moments.items()
        for rule in RULES
    }
    measured = _measure(fitted, held_out, settings)
    origin, rule = _chosen(measured, settings)
    tikhonov = semantics["settings"]["dictionary"]["tikhonov"]
    config = BundleConfig(
        name=settings.name,
        class_names=names,
        encoder=robust.config,
        selection=rule,
        tikhonov=TikhonovConfig.from_description(tikhonov),
        cbpdn=settings.cbpdn,
    )
    page = bundle_report(
        settings.name,
        names,
        semantics,
        {name: fitted[name, "mahalanobis"] for name in moments},
        measured,
        (origin, rule),
        atoms,
        f"{threat.norm} {threat.epsilon:.4g} by PGD of 10 steps",
    )
    # The bundle last: when it is there, so is its report.
    atomic_write(settings.output / REPORT, page.encode())
    bundle = Bundle(config, robust.model.state_dict(), fitted[origin, rule], atoms)
    content = {
        "gaussians": origin,
        "selection_on_validation": [_described(entry) for entry in measured],
        **_provenance(settings, semantics, robust),
    }
    save_bundle(settings.output, bundle, content, half=settings.half_precision)
    best = next((entry.outcome for entry in measured if _is(entry, origin, rule)), None)
    size = sum(path.stat().st_size for path in settings.output.glob("*.safetensors"))
    return {
        "clusters": len(keys),
        "gaussians of": origin,
        "selection": rule,
        "own class, clean": best and best.own_clean.mean().item(),
        "own class, attacked": best and best.own_attacked.mean().item(),
        "same cluster under attack": best and best.same.mean().item(),
        "megabytes": round(size / 2**20, 2),
        "output": str(settings.output),
        "report": str(settings.output / REPORT),
    }


def _gather(
    settings: BuildBundleSettings, threat: ThreatModel
) -> tuple[dict[Origin, GaussianMoments], dict[Origin, HeldOutLatents]]:
    """Return what the cluster computes: sums over latents, and latents of attacked validation images."""
    with ray_session(settings.ray):
        waiting = {network: _attacked(network, settings, threat) for network in _attacked_networks(settings)}
        moments = {
            origin: cluster_moments(
                settings.semantics,
                getattr(settings, origin),
                origin,
                device=settings.device,
                settings=settings.ray,
            )
            for origin in _origins(settings)
        }
        return moments, {network: ray.get(task) for network, task in waiting.items()}


def _chosen(measured: Sequence[Measured], settings: BuildBundleSettings) -> tuple[Any, Any]:
    """Return origin and rule of the way that selects best on validation images; the given one without any."""
    ways = [entry for entry in measured if entry.encoder == "f_rob"]
    if not ways:
        return settings.gaussians, settings.selection
    best = max(ways, key=lambda entry: entry.outcome.score)
    return best.origin, best.rule


def _provenance(
    settings: BuildBundleSettings, semantics: dict[str, Any], robust: Classifier
) -> dict[str, Any]:
    return {
        TRAINING_DATA: labelled_data_digest(semantics["settings"]["train"]),
        "robust": robust.manifest["metrics"],
        # A digest, because a bundle travels and paths of the machine that made it do not.
        "settings_digest": json_digest(settings.deciding()),
        **{
            f"{name}_digest": artifact_digest(getattr(settings, name))
            for name in ("baseline", "semantics", "robust")
        },
    }


def _check(settings: BuildBundleSettings, semantics: dict[str, Any], robust: Classifier) -> None:
    for name, digest in (
        ("baseline", semantics["baseline_digest"]),
        ("semantics", robust.manifest["semantics_digest"]),
    ):
        if artifact_digest(getattr(settings, name)) != digest:
            raise ArtifactError(f"{settings.robust} was not trained with this {name} artifact")
    if settings.class_names and len(settings.class_names) != robust.config.num_classes:
        raise ArtifactError(f"--class-names needs {robust.config.num_classes} names")
    if not settings.validation and "auto" in (settings.gaussians, settings.selection):
        raise ArtifactError("without --validation, --gaussians and --selection must be given")


def _origins(settings: BuildBundleSettings) -> tuple[Origin, ...]:
    return ("baseline", "robust") if settings.gaussians == "auto" else (settings.gaussians,)


def _attacked_networks(settings: BuildBundleSettings) -> tuple[Origin, ...]:
    return ("baseline", "robust") if settings.validation else ()


def _attacked(
    network: Origin, settings: BuildBundleSettings, threat: ThreatModel
) -> "ray.ObjectRef[HeldOutLatents]":
    return start_attack(
        getattr(settings, network),
        network,
        settings.validation,
        settings.validation_images,
        threat,
        device=settings.device,
        task_gpus=settings.task_gpus,
        half=settings.half_precision and network == "robust",
    )


def _threat(robust: Classifier) -> ThreatModel:
    attack = robust.manifest["settings"]["attack"]
    return ThreatModel(attack["norm"], attack["epsilon"])


def _stored(gaussians: Gaussians, settings: BuildBundleSettings) -> Gaussians:
    """Return the Gaussians as they come back from the bundle, so that what ships is what is measured."""
    stored = Gaussians.unpack(gaussians.pack(half=settings.half_precision))
    return stored.to("cpu", torch.float64)


def _measure(
    fitted: Mapping[tuple[Origin, SelectionRule], Gaussians],
    held_out: Mapping[Origin, HeldOutLatents],
    settings: BuildBundleSettings,
) -> list[Measured]:
    """Return what every way to select does on validation images.

    f_bsl with its own Gaussians is there for comparison; a bundle always has f_rob.
    """
    measured = []
    for (origin, rule), gaussians in fitted.items():
        for network in held_out:
            if network == "baseline" and origin != "baseline":
                continue
            if network == "robust" and settings.selection not in ("auto", rule):
                continue
            outcome = selection_outcome(held_out[network], gaussians, rule)
            measured.append(Measured(ENCODERS[network], origin, rule, outcome))
            logger.info(
                "%s, Gaussians of %s, %s: own class %s clean, %s attacked; same cluster %s",
                *(ENCODERS[network], origin, rule, *outcome.cells()),
            )
    return measured


def _is(entry: Measured, origin: str, rule: SelectionRule) -> bool:
    return (entry.encoder, entry.origin, entry.rule) == ("f_rob", origin, rule)


def _described(entry: Measured) -> dict[str, Any]:
    outcome = entry.outcome
    return {
        "encoder": entry.encoder,
        "gaussians": entry.origin,
        "selection": entry.rule,
        "images": len(outcome.same),
        "clean": outcome.own_clean.mean().item(),
        "attacked": outcome.own_attacked.mean().item(),
        "same_cluster": outcome.same.mean().item(),
    }
