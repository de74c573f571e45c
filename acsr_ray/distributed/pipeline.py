"""The pipeline on Ray Data: read -> decode -> encode -> select -> purify -> write, one block per unit."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import Dataset

from acsr_ray.corpus.run_record import RunTally
from acsr_ray.corpus.stopping import StopRequest
from acsr_ray.corpus.units import Unit
from acsr_ray.distributed.blocks import Stage, map_in_actors, unit_blocks
from acsr_ray.distributed.overseer import start_overseer
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.runtime import (
    StageShares,
    cluster_size,
    ray_session,
    share_resources,
)
from acsr_ray.distributed.watching import Watch, WatchedChain
from acsr_ray.distributed.wave import Limits, run_wave
from acsr_ray.models.targets import absolute_location
from acsr_ray.purification.bundle import (
    find_bundle,
)
from acsr_ray.purification.doubt_stage import PurifyWithDoubt
from acsr_ray.purification.stages import (
    BATCH_SIZE,
    DecodeImages,
    EncodeImages,
    PurifyImages,
    ReadUnits,
    SelectClusters,
    WriteUnits,
)
from acsr_ray.storage import Storage

logger = logging.getLogger(__name__)


class Pipelines:
    """Ray, from the first wave that needs it to the end of the run.

    Args:
        settings: of the job.
        stop: listens again after Ray has taken the signal.
        tally: of the run.
    """

    def __init__(self, settings: PurifyCorpusSettings, stop: StopRequest, tally: RunTally) -> None:
        self._settings, self._stop, self._tally = settings, stop, tally
        self._open = ExitStack()
        self._overseer: ActorHandle[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def run(self, units: list[Unit], writer: dict[str, Any], storage: Storage) -> Iterator[pa.Table]:
        """Yield a table per unit: its receipt, or why it failed."""
        settings = self._settings
        if self._overseer is None:
            self._open.enter_context(ray_session(settings.ray))
            self._stop.listen()
            self._overseer = start_overseer(storage.root, settings.connection)
        shares = share_resources(settings.device, settings.ray, len(units))
        self._tally.resources(*cluster_size(settings.device))
        logger.info("batch size %d, %s", settings.batch_size or BATCH_SIZE[shares.device], shares)
        context = ray.data.DataContext.get_current()
        # The watchdog acts long before; this is for a cluster that gives no actor a place.
        context.execution_no_progress_timeout_s = max(1800.0, 4 * settings.stage_timeout_s)
        pipeline = build_pipeline(settings, units, writer, shares, self._overseer)
        limits = Limits(settings.stage_timeout_s, settings.min_free_bytes)
        yield from run_wave(pipeline, self._overseer, storage, self._stop, limits, self._tally)


def build_pipeline(
    settings: PurifyCorpusSettings,
    units: list[Unit],
    writer: dict[str, Any],
    shares: StageShares,
    overseer: "ActorHandle[Any]",
) -> Dataset:
    """Return the lazy pipeline from units to one row per unit: its name and receipt, or why it failed."""
    bundle = str(find_bundle(settings.bundle))
    threads = settings.ray.threads_per_actor
    model = {
        "bundle": bundle,
        "device": shares.device,
        "threads": threads,
        "batch_size": settings.batch_size or BATCH_SIZE[shares.device],
        "options": settings.options,
    }

    def watched(position: str, actors: int) -> dict[str, Any]:
        watch = Watch(overseer, writer["fingerprint"], position, actors)
        return {"chain": WatchedChain, "options": {"watch": watch}, "actors": actors}

    decoding = {
        "image_column": settings.image_column,
        "limits": settings.decode,
        "decoder": settings.decoder,
        "seconds": settings.stage_timeout_s / 3,
    }
    purifying = {**model, "on_failure": settings.on_failure}
    decoded = map_in_actors(
        unit_blocks(units),
        (ReadUnits, {}),
        (DecodeImages, decoding),
        cpus=shares.codec_cpus,
        **watched("first", shares.codec_actors),
    )
    encode: Stage = (EncodeImages, model)
    selecting = {name: model[name] for name in ("bundle", "threads", "options", "device")}
    select: Stage = (SelectClusters, selecting)
    purify: Stage = (PurifyImages, purifying)
    if settings.doubt is not None:
        # Workers have other working directories.
        target = settings.target and absolute_location(settings.target)
        doubt = str(Path(settings.doubt).resolve())
        purify = PurifyWithDoubt, {"purify": purifying, "doubt": doubt, "target": target}
    if shares.encode_actors:
        selected = map_in_actors(
            decoded,
            encode,
            select,
            cpus=shares.encode_cpus,
            gpus=shares.encode_gpus,
            **watched("middle", shares.encode_actors),
        )
        stages, cpus = [purify], shares.purify_cpus
    else:
        selected, stages = decoded, [encode, select, purify]
        cpus = shares.encode_cpus + shares.purify_cpus
    purified = map_in_actors(
        selected,
        *stages,
        cpus=cpus,
        gpus=shares.purify_gpus,
        **watched("middle", shares.purify_actors),
    )
    write: Stage = (WriteUnits, writer)
    return map_in_actors(purified, write, cpus=shares.codec_cpus, **watched("last", shares.codec_actors))
