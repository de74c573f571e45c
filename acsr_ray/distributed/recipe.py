"""From a corpus to a bundle by one command: the stages of a settings file in order, without those done."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acsr_ray.artifacts import ArtifactError, artifact_digest, json_digest, load_artifact
from acsr_ray.config import ConfigError, JobSettings, load_section, parse_job
from acsr_ray.distributed.bundling import BuildBundleSettings, build_bundle
from acsr_ray.distributed.latents import TRAINING_DATA, labelled_data_digest
from acsr_ray.distributed.purifier_training import (
    RECONSTRUCTION,
    TrainPurifierSettings,
    train_purifier,
)
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.distributed.semantics import LearnSemanticsSettings, learn_semantics
from acsr_ray.distributed.training import (
    TrainBaselineSettings,
    TrainRobustSettings,
    train_baseline,
    train_robust,
)
from acsr_ray.models.targets import load_target

logger = logging.getLogger(__name__)


class MakeBundleSettings(JobSettings):
    """Make a bundle from a corpus: every stage of a recipe that is not done yet."""

    recipe: Path
    """YAML file with a section for each of train_baseline, learn_semantics, train_robust and build_bundle,
    and one for train_purifier if the bundle is to have an unrolled reconstruction."""
    dry_run: bool = False
    """Only print the plan."""
    ray: RaySettings = RaySettings()
    """Where Ray runs; one session for all stages."""


@dataclass(frozen=True)
class Stage:
    """One stage: its job, the kind of artifact it leaves, and the artifacts it is made from.

    `section` is where the manifest records the stage, None for its top; an `optional` stage may be left out.
    """

    job: str
    settings: type[Any]
    run: Callable[[Any], Mapping[str, Any]]
    kind: str
    inputs: tuple[str, ...]
    section: str | None = None
    optional: bool = False


STAGES = (
    Stage("train_baseline", TrainBaselineSettings, train_baseline, "baseline", ()),
    Stage("learn_semantics", LearnSemanticsSettings, learn_semantics, "semantics", ("baseline",)),
    Stage("train_robust", TrainRobustSettings, train_robust, "robust", ("baseline", "semantics")),
    Stage("build_bundle", BuildBundleSettings, build_bundle, "bundle", ("baseline", "semantics", "robust")),
    Stage(
        "train_purifier",
        TrainPurifierSettings,
        train_purifier,
        "bundle",
        ("bundle",),
        section=RECONSTRUCTION,
        optional=True,
    ),
)


@dataclass(frozen=True)
class Planned:
    """A stage with its settings, and why it has to run; None when it is done."""

    stage: Stage
    settings: Any
    reason: str | None


def make_bundle(settings: MakeBundleSettings) -> dict[str, Any]:
    """Print the plan of a recipe, then run what is left of it, in order.

    Raises:
        ConfigError: a section is missing or wrong, or the stages do not name each other's folders.
    """
    plan = plan_recipe(settings.recipe)
    for planned in plan:
        logger.info(
            "%-16s -> %s: %s", planned.stage.job, planned.settings.output, planned.reason or "done before"
        )
    summary: dict[str, Any] = {}
    if not settings.dry_run:
        with ray_session(settings.ray):
            for planned in plan:
                if planned.reason is not None:
                    logger.info("%s", planned.stage.job)
                    summary = dict(planned.stage.run(planned.settings))
    done = [planned.stage.job for planned in plan if planned.reason is None]
    return {
        "done before": done,
        "run now": [] if settings.dry_run else [p.stage.job for p in plan if p.reason is not None],
        **summary,
        "bundle": str(plan[-1].settings.output),
    }


def plan_recipe(recipe: Path) -> list[Planned]:
    """Return every stage with why it has to run: nothing there, other settings, or made from other artifacts.

    A stage whose input is made anew has to run too.
    """
    plan: list[Planned] = []
    folders: dict[str, Path] = {}
    renewed: set[str] = set()
    for stage in STAGES:
        if not load_section(recipe, stage.job):
            if stage.optional:
                continue
            raise ConfigError(f"{recipe} has no section {stage.job}")
        settings = parse_job(stage.settings, stage.job, ["--config", str(recipe)])
        for name in stage.inputs:
            if Path(getattr(settings, name)) != folders[name]:
                raise ConfigError(
                    f"{recipe}: {stage.job}.{name} is {getattr(settings, name)}, but the stage before "
                    f"writes {folders[name]}"
                )
        anew = [name for name in stage.inputs if name in renewed]
        reason = f"its {anew[0]} is made anew" if anew else _reason(stage, settings)
        if reason is not None:
            renewed.add(stage.kind)
        folders[stage.kind] = settings.output
        plan.append(Planned(stage, settings, reason))
    return plan


def _reason(stage: Stage, settings: Any) -> str | None:  # noqa: ANN401
    try:
        manifest = load_artifact(settings.output, stage.kind)
    except ArtifactError as error:
        return "not there yet" if "is missing" in str(error) else str(error)
    if stage.section is not None:
        manifest = manifest.get(stage.section, {"settings_digest": None})
    wanted = settings.deciding()
    if "settings_digest" in manifest:
        if manifest["settings_digest"] != json_digest(wanted):
            return "made with other settings"
    else:
        recorded = manifest.get("settings", {})
        changed = [name for name, value in wanted.items() if recorded.get(name) != value]
        if changed:
            return f"made with other settings: {', '.join(changed)}"
    data = manifest.get(TRAINING_DATA)
    if data is not None and "train" in wanted and data != labelled_data_digest(settings.train):
        return "its shards were changed"
    init = getattr(settings, "init", None)
    if isinstance(init, Path) and manifest.get("init_digest") != artifact_digest(init):
        return f"made from other weights than those of {init}"
    surrogates = manifest.get("surrogates")
    if surrogates is not None and surrogates != [load_target(name).digest for name in settings.surrogates]:
        return "trained against other surrogates"
    for name in stage.inputs:
        digest = manifest.get(f"{name}_digest")
        if digest is not None and digest != artifact_digest(Path(getattr(settings, name))):
            return f"made from another {name}"
    return None
