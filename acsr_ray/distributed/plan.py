"""Plan a purification without doing it: footers, a timed sample, and what a cluster makes of both."""

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from acsr_ray.artifacts import MANIFEST, json_digest
from acsr_ray.config import ConfigError, Device, FailedError, Settings
from acsr_ray.corpus.changes import check_there, list_corpus
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.records import PLAN
from acsr_ray.corpus.removals import RemovalError, check_removed
from acsr_ray.corpus.sources import CorpusError, ImageFolder, Shard
from acsr_ray.corpus.survey import OutputState, Problem, Survey, survey_corpus
from acsr_ray.corpus.units import check_source
from acsr_ray.distributed.plan_table import plan_table
from acsr_ray.distributed.purify_settings import (
    PurifyCorpusSettings,
    binding_settings,
    deciding_settings,
    output_location,
)
from acsr_ray.distributed.runtime import divide_resources
from acsr_ray.distributed.sample_run import Machine, SampleRun, SampleSize, run_sample
from acsr_ray.distributed.standing import completed
from acsr_ray.filesystems import over_stores
from acsr_ray.models.targets import absolute_location
from acsr_ray.purification.bundle import find_bundle, load_bundle
from acsr_ray.purification.estimate import Layout, Load, Range, costs_of, estimate, on_gpu, size_strata
from acsr_ray.purification.sizing import Sample, StageRecipe, Work
from acsr_ray.purification.stages import BATCH_SIZE

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DRIVER_MIB, DRIVER_UNIT_KIB = 350.0, 2.0
"""Memory of the driver with Ray and torch, and what a unit of the output adds to it."""
STORE_MIB, STORE_UNITS_PER_ACTOR = 40.0, 4.0
"""Object store: what lies there anyway, and units on their way per actor."""
MEMORY_SPREAD = 1.3


class ClusterSettings(Settings):
    """A cluster to plan for instead of the one that is joined, or of this machine."""

    cpus: float | None = Field(None, gt=0)
    """CPUs of all its nodes."""
    gpus: float | None = Field(None, ge=0)
    """GPUs of all its nodes."""
    nodes: int | None = Field(None, ge=1)
    """Number of its nodes; CPUs and GPUs are taken to be spread evenly."""
    gpu_speedup: float | None = Field(None, gt=0)
    """How many times as fast a GPU is at encoding and reconstruction as a core here: needed only to plan for
    GPUs where there is none to measure on."""


class PlanSettings(PurifyCorpusSettings):
    """Say what a purification would do, take and cost, without doing it.

    Takes the settings of purify_corpus. Reads footers, and the units that a small sample lies in; writes
    nothing but OUTPUT/_acsr/plan.json.
    """

    sample: int = Field(256, ge=1)
    """Images that are purified to see how long it takes."""
    sample_seconds: float = Field(120.0, gt=0)
    """Longest time for the sample; of large images it then holds fewer."""
    cluster: ClusterSettings = ClusterSettings()
    """Plan for another cluster than the one that is joined."""

    def render(self, summary: Mapping[str, Any]) -> str:
        """Return the plan as a table for people."""
        return plan_table(summary)


@dataclass(frozen=True)
class _Output:
    """The output as it is: its ledger if one was named, and whether the job would refuse it."""

    ledger: Ledger | None
    state: OutputState
    refusal: str | None


@over_stores
def plan(settings: PlanSettings) -> dict[str, Any]:
    """Plan a purification and return the plan; with an output, keep it there as `_acsr/plan.json`.

    Raises:
        CorpusError: there is no input, or none is named, or settings of the output are none of this release.
        ArtifactError: a bundle that is absent or was changed.
        ConfigError: a plan for GPUs where none can be measured.
        ResourceError: a cluster that cannot be joined.
    """
    if settings.demo:
        raise ConfigError("--demo is not planned: it takes a few minutes")
    if not settings.input:
        # As the other verbs that know the output: with its own settings, those that were given apart.
        settings = completed(settings)
    if not settings.input:
        raise CorpusError("--input is needed, or an --output that knows it")
    load_bundle(settings.bundle).config.with_reconstruction(settings.reconstruction)
    began = time.perf_counter()
    output = _look_at_output(settings)
    check_there(settings.input)
    source = list_corpus(settings.input)
    check_source(source, settings.input, settings.image_column)
    survey = survey_corpus(source, settings.plan, output.state, settings.limit)
    output = _with_removals(output, source, survey, settings.max_removed_share)
    listing_s = time.perf_counter() - began
    content = _content(settings, survey, output, listing_s)
    if output.ledger is not None:
        output.ledger.storage.write(PLAN, (json.dumps(content, indent=1) + "\n").encode())
    return content


def _look_at_output(settings: PlanSettings) -> _Output:
    """Look at the output as a run would before it begins; writes nothing."""
    deciding = deciding_settings(settings)
    fingerprint = json_digest(deciding)
    if not settings.output:
        return _Output(None, OutputState(fingerprint=fingerprint), None)
    assert settings.input is not None
    ledger = Ledger(output_location(settings.output, settings.input))
    bound = binding_settings(settings, deciding)
    # A retry that raised limits left units under the name of the limits before.
    fingerprint = ledger.binding.naming_after(bound, fingerprint)
    manifest = json.loads((find_bundle(settings.bundle) / MANIFEST).read_bytes())
    refusal = None
    try:
        ledger.check(bound, manifest, anew=settings.anew)
    except CorpusError as error:
        refusal = str(error)
    return _Output(ledger, OutputState(ledger.snapshot(), fingerprint, ledger.finished()), refusal)


def _with_removals(
    output: _Output, source: list[Shard] | ImageFolder, survey: Survey, most: float
) -> _Output:
    """Return the output as refused where too much of what was purified has left the input."""
    if output.refusal is not None:
        return output
    before = output.state.snapshot.shards
    empty = {shard.uri for shard in survey.shards if not shard.images and shard.problem is None}
    emptied = [name for name, entry in before.items() if entry.receipts and entry.uri in empty]
    try:
        check_removed(before, source, most, emptied)
    except RemovalError as error:
        return replace(output, refusal=str(error))
    return output


def _content(settings: PlanSettings, survey: Survey, output: _Output, listing_s: float) -> dict[str, Any]:
    units = survey.units_to_do
    told = survey.as_json()
    problems = [problem.as_json() for problem in survey.problems]
    if output.refusal is not None:
        assert output.ledger is not None
        problems.insert(0, Problem(output.ledger.output, "output_refused", output.refusal).as_json())
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "planned_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **told,
        "problems": problems,
        "refused": output.refusal,
    }
    if not units:
        return content | _nothing_to_do(listing_s)
    found = run_sample(
        settings.ray,
        _measured_on(settings),
        _recipe(settings),
        _work(settings),
        units,
        SampleSize(settings.sample, settings.sample_seconds, settings.unit_rows),
        check=lambda here: _planned_for(settings, here),
    )
    if not found.sample.images:
        raise FailedError("nothing of the sample can be read: " + "; ".join(found.sample.unreadable[:3]))
    machine = _planned_for(settings, found.machine)
    layout = _layout(settings, machine, len(units))
    load = Load(
        images=told["images_to_do"],
        units=len(units),
        waves=math.ceil(len(units) / settings.wave_units),
        hashed_bytes=told["bytes_hashed"],
        listing_s=listing_s,
        start_s=found.start_s,
        pools_s=found.pools_s,
    )
    sample, work = found.sample, found.work
    if layout.device != found.device:
        assert settings.cluster.gpu_speedup is not None
        sample = on_gpu(sample, settings.cluster.gpu_speedup)
    ranges = estimate(sample, work, layout, load)
    told_ranges = {name: value.as_json() for name, value in ranges.items()}
    problems += _room(output.ledger, settings, ranges["output_bytes"])
    return content | {
        "sample": _sample_as_json(found, sample, work),
        "cluster": machine.as_json(),
        "estimate": told_ranges | {"memory_mib": _memory(sample, layout, len(units))},
    }


def _measured_on(settings: PlanSettings) -> Device:
    """Return the device setting for the sample: on a GPU where there is one, if the plan is for GPUs."""
    asked = settings.cluster.gpus
    if asked is None or settings.device == "cpu":
        return settings.device
    return "auto" if asked else "cpu"


def _recipe(settings: PlanSettings) -> StageRecipe:
    return StageRecipe(
        bundle=str(find_bundle(settings.bundle)),
        device="cpu",
        threads=settings.ray.threads_per_actor,
        batch_size=settings.batch_size,
        options=settings.options,
        image_column=settings.image_column,
        keep_original=settings.keep_original,
        on_failure=settings.on_failure,
        limits=settings.decode,
        decoder=settings.decoder,
        # Workers have other working directories.
        doubt=None if settings.doubt is None else str(Path(settings.doubt).resolve()),
        target=settings.target and absolute_location(settings.target),
    )


def _work(settings: PlanSettings) -> Work:
    config = load_bundle(settings.bundle).config.with_reconstruction(settings.reconstruction)
    return Work("cpu", settings.batch_size or BATCH_SIZE["cpu"], config.reconstruction)


def _planned_for(settings: PlanSettings, here: Machine) -> Machine:
    """Return the cluster that is planned for, where the sample is taken here.

    Raises:
        ConfigError: it has GPUs, and neither a measurement nor a word says how fast they are.
    """
    asked = settings.cluster
    cpus = here.cpus if asked.cpus is None else asked.cpus
    gpus = here.gpus if asked.gpus is None else asked.gpus
    if settings.device == "cpu":
        gpus = 0.0
    if settings.device == "cuda" and not gpus:
        raise ConfigError("device is cuda, but the cluster that is planned for has no GPU")
    if gpus and not here.gpus and asked.gpu_speedup is None:
        raise ConfigError(
            "a plan for GPUs needs one to measure on: plan on the cluster itself, or say with "
            "--cluster.gpu-speedup how many times as fast as a core here one is"
        )
    return Machine(cpus, gpus, here.nodes if asked.nodes is None else asked.nodes)


def _layout(settings: PlanSettings, machine: Machine, units: int) -> Layout:
    shares = divide_resources(machine.cpus, machine.gpus, settings.ray, units)
    return Layout(
        shares.device,
        machine.cpus,
        machine.gpus,
        shares.purify_actors,
        shares.encode_actors,
        shares.codec_actors,
        settings.ray.threads_per_actor,
    )


def _nothing_to_do(listing_s: float) -> dict[str, Any]:
    nothing, seconds = Range(0, 0, 0).as_json(), Range(listing_s, listing_s, listing_s).as_json()
    names = ("images_per_s", "cpu_hours", "gpu_hours", "output_bytes", "quarantined")
    memory = {name: nothing for name in ("driver", "worker", "object_store")}
    return {
        "sample": {"images": 0, "seconds": 0.0},
        "cluster": Machine(0, 0, 0).as_json(),
        "estimate": {"seconds": seconds, **dict.fromkeys(names, nothing), "memory_mib": memory},
    }


def _memory(sample: Sample, layout: Layout, units: int) -> dict[str, dict[str, float]]:
    """Return the MiB of the driver, the largest worker and the object stores together."""
    pixels = [3 * h * w * count for unit in sample.units for (h, w), count in unit.sizes.items()]
    unit_mib = (sum(pixels) + sum(u.encoded_bytes for u in sample.units)) / len(sample.units) / 2**20
    actors = layout.purify_actors + layout.encode_actors + 2 * layout.codec_actors
    means = {
        "driver": DRIVER_MIB + units * DRIVER_UNIT_KIB / 1024,
        # The sample's process has all stages, a worker some of them, but pixels of a whole unit.
        "worker": sample.memory_mib + 2 * unit_mib,
        "object_store": STORE_MIB + STORE_UNITS_PER_ACTOR * actors * unit_mib,
    }
    return {
        name: Range(mean / MEMORY_SPREAD, mean, mean * MEMORY_SPREAD).as_json()
        for name, mean in means.items()
    }


def _room(ledger: Ledger | None, settings: PlanSettings, needed: Range) -> list[dict[str, str]]:
    """Return a problem where the output's disk may not have room for it."""
    free = None if ledger is None else ledger.storage.free_bytes()
    if ledger is None or free is None or free - settings.min_free_bytes >= needed.high:
        return []
    message = (
        f"{free / 2**20:.0f} MiB are free, and {needed.mean / 2**20:.0f} "
        f"({needed.low / 2**20:.0f} to {needed.high / 2**20:.0f}) are needed, beside "
        f"{settings.min_free_megabytes} to be left (--min-free-megabytes)"
    )
    return [Problem(ledger.output, "no_room", message).as_json()]


def _sample_as_json(found: SampleRun, sample: Sample, work: Work) -> dict[str, Any]:
    costs = costs_of(sample, work)
    milliseconds = {name: round(1000 * value, 4) for name, value in asdict(costs).items()}
    del milliseconds["output_bytes"]
    return {
        "images": sample.images,
        "seconds": round(found.seconds, 1),
        "units": len(sample.units),
        "processes": found.processes,
        "device": found.device,
        "milliseconds_per_image": milliseconds,
        "quarantined": sum(unit.quarantined for unit in sample.units),
        "megapixels": size_strata(sample),
        "slowed_by_others": round(sample.clock_s / max(1e-9, sample.cpu_s), 2),
        "start_s": round(found.start_s + found.pools_s, 1),
        "unreadable": list(sample.unreadable),
    }
