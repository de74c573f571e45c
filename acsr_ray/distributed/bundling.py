"""Put semantics and the robust encoder together as a bundle, choosing on the validation split.

Chosen there, never on test images: whether the clusters' Gaussians stay those of f_bsl or are refitted on
the latents of f_rob (same assignments), and how clusters are compared at inference. The measure is the share
of validation images, clean and attacked, whose selected cluster belongs to their class.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from acsr_ray.artifacts import ArtifactError, artifact_digest, json_digest, load_artifact
from acsr_ray.attacks.pgd import attack_pixels
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.clustering.assignments import ASSIGNMENTS, Assignments
from acsr_ray.clustering.gaussians import Gaussians
from acsr_ray.clustering.selection import RULES, SelectionRule, select_cluster
from acsr_ray.config import Device, JobSettings
from acsr_ray.corpus.images import to_unit_range
from acsr_ray.corpus.labelled import read_labelled
from acsr_ray.distributed.latents import Latents, compute_latents, labelled_data_digest
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.distributed.semantics import load_semantics_dictionaries
from acsr_ray.models.classifier import Classifier, encode, load_classifier
from acsr_ray.purification.bundle import Bundle, BundleConfig, save_bundle
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.tikhonov import TikhonovConfig
from acsr_ray.training.loop import resolve_device

logger = logging.getLogger(__name__)

Origin = Literal["baseline", "robust"]


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
    cbpdn: CbpdnConfig = CbpdnConfig()
    """Sparse coding at inference; lmbda as in the dictionaries."""
    device: Device = "auto"
    """Where latents are computed."""
    ray: RaySettings = RaySettings()
    """Where Ray runs and how much of it to take."""


@dataclass(frozen=True)
class Candidate:
    """One way to select clusters, and the share of validation images sent to their own class."""

    origin: Origin
    rule: SelectionRule
    gaussians: Gaussians
    clean: float | None = None
    attacked: float | None = None


def build_bundle(settings: BuildBundleSettings) -> dict[str, Any]:
    """Choose what is left open, write the bundle and return what was chosen and measured.

    Raises:
        ArtifactError: artifacts that do not belong together, or `auto` without validation shards.
    """
    semantics = load_artifact(settings.semantics, "semantics")
    robust = load_classifier(settings.robust, "robust")
    for name, digest in (
        ("baseline", semantics["baseline_digest"]),
        ("semantics", robust.manifest["semantics_digest"]),
    ):
        if artifact_digest(getattr(settings, name)) != digest:
            raise ArtifactError(f"{settings.robust} was not trained with this {name} artifact")
    if settings.class_names and len(settings.class_names) != robust.config.num_classes:
        raise ArtifactError(f"--class-names needs {robust.config.num_classes} names")
    keys, atoms = load_semantics_dictionaries(settings.semantics)
    candidates = _measure(_candidates(settings, semantics), settings, robust)
    best = max(candidates, key=lambda c: (c.clean or 0) + (c.attacked or 0))
    found = zip(best.gaussians.class_id.tolist(), best.gaussians.cluster_id.tolist(), strict=True)
    if list(found) != keys:
        raise ArtifactError("the semantics' dictionaries and clusters do not match")
    tikhonov = semantics["settings"]["dictionary"]["tikhonov"]
    config = BundleConfig(
        name=settings.name,
        class_names=settings.class_names or robust.class_names,
        encoder=robust.config,
        selection=best.rule,
        tikhonov=TikhonovConfig.from_description(tikhonov),
        cbpdn=settings.cbpdn,
    )
    bundle = Bundle(config, robust.model.state_dict(), best.gaussians, atoms)
    measured = [
        {"gaussians": c.origin, "selection": c.rule, "clean": c.clean, "attacked": c.attacked}
        for c in candidates
    ]
    content = {
        "gaussians": best.origin,
        "selection_on_validation": measured,
        "training_data_digest": labelled_data_digest(semantics["settings"]["train"]),
        "robust": robust.manifest["metrics"],
        # A digest, because a bundle travels and paths of the machine that made it do not.
        "settings_digest": json_digest(settings.deciding()),
        **{
            f"{name}_digest": artifact_digest(getattr(settings, name))
            for name in ("baseline", "semantics", "robust")
        },
    }
    save_bundle(settings.output, bundle, content)
    size = sum(path.stat().st_size for path in settings.output.glob("*"))
    return {
        "clusters": len(keys),
        "gaussians of": best.origin,
        "selection": best.rule,
        "own class, clean": best.clean,
        "own class, attacked": best.attacked,
        "megabytes": round(size / 2**20, 2),
        "output": str(settings.output),
    }


def _candidates(settings: BuildBundleSettings, semantics: dict[str, Any]) -> list[Candidate]:
    origins: tuple[Origin, ...] = (
        ("baseline", "robust") if settings.gaussians == "auto" else (settings.gaussians,)
    )
    rules = RULES if settings.selection == "auto" else (settings.selection,)
    assignments = Assignments.load(settings.semantics / ASSIGNMENTS)
    candidates = []
    with ray_session(settings.ray):
        for origin in origins:
            latents: Latents = compute_latents(
                semantics["settings"]["train"],
                getattr(settings, origin),
                origin,
                cache=settings.semantics,
                device=settings.device,
                settings=settings.ray,
            )
            keys = list(zip(latents.image_shards(), latents.rows.tolist(), strict=True))
            moments = latents.gaussian_moments(assignments.clusters_of(keys))
            for rule in rules:
                gaussians = moments.finish(semantics["settings"]["inverse"], tied=rule == "tied")
                candidates.append(Candidate(origin, rule, gaussians))
    return candidates


def _measure(
    candidates: Sequence[Candidate], settings: BuildBundleSettings, robust: Classifier
) -> list[Candidate]:
    """Add each candidate's selection accuracy on validation images, clean and attacked on f_rob by PGD."""
    if not settings.validation:
        if len(candidates) > 1:
            raise ArtifactError("without --validation, --gaussians and --selection must be given")
        return list(candidates)
    device = resolve_device(settings.device)
    data = read_labelled(settings.validation, robust.config.image_size)
    pixels = data.pixels[: settings.validation_images]
    labels = data.labels[: settings.validation_images]
    attack = robust.manifest["settings"]["attack"]
    threat = ThreatModel(attack["norm"], attack["epsilon"])
    attacked = attack_pixels(robust.model.to(device), pixels, labels, threat, device)
    clean_latents, attacked_latents = (_latents(robust, images, device) for images in (pixels, attacked))
    measured = []
    for candidate in candidates:
        clean, hit = (_own_class(latents, labels, candidate) for latents in (clean_latents, attacked_latents))
        logger.info(
            "Gaussians of %s, %s: own class %.3f clean, %.3f attacked",
            candidate.origin,
            candidate.rule,
            clean,
            hit,
        )
        measured.append(Candidate(candidate.origin, candidate.rule, candidate.gaussians, clean, hit))
    return measured


def _latents(robust: Classifier, pixels: NDArray[np.uint8], device: str) -> torch.Tensor:
    images = torch.from_numpy(to_unit_range(pixels)).to(device)
    with torch.inference_mode():
        return encode(robust.model, images, robust.config.image_size).double().cpu()


def _own_class(latents: torch.Tensor, labels: NDArray[np.int64], candidate: Candidate) -> float:
    chosen = select_cluster(latents, candidate.gaussians, candidate.rule).index
    return (candidate.gaussians.class_id[chosen].numpy() == labels).mean().item()
