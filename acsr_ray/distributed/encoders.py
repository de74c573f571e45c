"""Compare robust encoders by what ACSR needs of them: does the selected cluster survive an attack?

The paper trains f_rob with RST so that clean and attacked images have latents of one distribution. This job
tests that: for encoders trained on one semantics artifact, the share of held-out images that get a cluster of
their class, and the share whose cluster stays the same under a white-box attack on that encoder, each with
its interval, and the paired difference to a reference encoder.
"""

from pathlib import Path
from typing import Any

import ray
from pydantic import Field

from acsr_ray.artifacts import ArtifactError, artifact_digest, atomic_write, load_artifact
from acsr_ray.attacks.threat import Norm, ThreatModel
from acsr_ray.clustering.gaussians import Inverse
from acsr_ray.clustering.selection import SelectionRule
from acsr_ray.config import Device, JobSettings
from acsr_ray.distributed.encoding import cluster_moments, start_attack
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.evaluation.selection_quality import SelectionOutcome, selection_outcome
from acsr_ray.evaluation.statistics import mcnemar, paired_difference
from acsr_ray.evaluation.tables import Table, to_csv, to_markdown


class CompareEncodersSettings(JobSettings):
    """Compare robust encoders: does the cluster selected for an image survive an attack on the encoder?"""

    encoders: tuple[Path, ...] = Field(min_length=1)
    """Artifacts of train_robust made with one semantics artifact; the first is the reference."""
    semantics: Path
    """That artifact."""
    test: tuple[str, ...] = Field(min_length=1)
    """Labelled shards of the images that are attacked."""
    images: int = Field(1000, ge=1)
    """Most images."""
    rule: SelectionRule = "tied"
    """How clusters are compared, among Gaussians refitted on each encoder's own latents."""
    norm: Norm = "l2"
    """Norm of the attack, PGD of 10 steps."""
    epsilon: float = Field(0.3, gt=0)
    """Its radius on the [0, 1] pixel scale."""
    task_gpus: float = Field(0.5, gt=0)
    """GPU share of the task that attacks an encoder, where there are GPUs."""
    device: Device = "auto"
    """Where latents and attacks are computed."""
    ray: RaySettings = RaySettings()
    """Where Ray runs and how much of it to take."""
    output: Path
    """Folder of `encoders.md` and `encoders.csv`."""


def compare_encoders(settings: CompareEncodersSettings) -> dict[str, Any]:
    """Run the job and return the rows of its table.

    Raises:
        ArtifactError: an encoder that was trained with other semantics.
    """
    inverse: Inverse = load_artifact(settings.semantics, "semantics")["settings"]["inverse"]
    digest = artifact_digest(settings.semantics)
    for encoder in settings.encoders:
        if load_artifact(encoder, "robust").get("semantics_digest") != digest:
            raise ArtifactError(f"{encoder} was not trained with {settings.semantics}")
    with ray_session(settings.ray):
        outcomes = {encoder: _outcome(encoder, settings, inverse) for encoder in settings.encoders}
    table = encoders_table(outcomes, settings)
    atomic_write(settings.output / "encoders.md", to_markdown(table).encode())
    atomic_write(settings.output / "encoders.csv", to_csv(table).encode())
    return {
        "table": str(settings.output / "encoders.md"),
        **{row[0]: " | ".join(row[1:]) for row in table.rows},
    }


def _outcome(encoder: Path, settings: CompareEncodersSettings, inverse: Inverse) -> SelectionOutcome:
    held_out = start_attack(
        encoder,
        "robust",
        settings.test,
        settings.images,
        ThreatModel(settings.norm, settings.epsilon),
        device=settings.device,
        task_gpus=settings.task_gpus,
    )
    moments = cluster_moments(
        settings.semantics, encoder, "robust", device=settings.device, settings=settings.ray
    )
    gaussians = moments.finish(inverse, tied=settings.rule == "tied")
    return selection_outcome(ray.get(held_out), gaussians, settings.rule)


def encoders_table(outcomes: dict[Path, SelectionOutcome], settings: CompareEncodersSettings) -> Table:
    """Return a row per encoder; differences are paired with the first."""
    reference = next(iter(outcomes.values()))
    rows = []
    for encoder, outcome in outcomes.items():
        against = "reference", ""
        if outcome is not reference:
            p_value = mcnemar(outcome.same, reference.same).p_value
            against = str(paired_difference(outcome.same, reference.same)), f"{p_value:.2g}"
        rows.append((encoder.name, *outcome.cells(), *against))
    header = (
        "encoder",
        "own class, clean",
        "own class, attacked",
        "same cluster under attack",
        "same cluster, difference",
        "p (McNemar)",
    )
    caption = (
        f"{len(reference.same)} images; {settings.norm} {settings.epsilon:.4g} by PGD of 10 steps on each "
        f"encoder; {settings.rule} among Gaussians of its own latents. Percent [95 %]."
    )
    return Table("Does the selected cluster survive the attack?", caption, header, tuple(rows))
