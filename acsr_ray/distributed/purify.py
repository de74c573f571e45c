"""Purify a corpus on Ray Data: read -> decode -> encode -> select -> purify -> write, one block per unit."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import ray
from pydantic import Field
from ray.actor import ActorHandle
from ray.data import Dataset

from acsr_ray.artifacts import MANIFEST, json_digest
from acsr_ray.columns import IMAGE
from acsr_ray.config import Device, FailedError, JobSettings
from acsr_ray.corpus.changes import check_there, list_corpus
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.isolated import DecoderSettings
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.night import Night, NightSettings
from acsr_ray.corpus.retry_request import OrdinaryRun, RetryRequest
from acsr_ray.corpus.sources import CorpusError, ImageFolder, absolute_uri
from acsr_ray.corpus.stopping import StopRequest, stop_request
from acsr_ray.corpus.units import Unit, UnitPlan, check_folder
from acsr_ray.distributed.blocks import Stage, map_in_actors, unit_blocks
from acsr_ray.distributed.overseer import start_overseer
from acsr_ray.distributed.runtime import (
    RaySettings,
    StageShares,
    ray_session,
    share_resources,
)
from acsr_ray.distributed.watching import Watch, WatchedChain
from acsr_ray.distributed.wave import Limits, check_room, run_wave
from acsr_ray.models.targets import absolute_location
from acsr_ray.purification.bundle import (
    ALGORITHM_VERSION,
    DEFAULT_BUNDLE,
    bundle_digest,
    find_bundle,
    load_bundle,
)
from acsr_ray.purification.doubt_stage import PurifyWithDoubt, doubt_settings
from acsr_ray.purification.options import Precision, PurifyOptions, Reconstruction, Strength
from acsr_ray.purification.stages import (
    DecodeImages,
    EncodeImages,
    OnFailure,
    PurifyImages,
    ReadUnits,
    SelectClusters,
    WriteUnits,
)
from acsr_ray.storage import Storage

logger = logging.getLogger(__name__)

SHOWN_FAILURES = 5


class PurifyCorpusSettings(JobSettings):
    """Purify a corpus of images with a bundle: OUTPUT/data gets one Parquet file per unit of rows.

    A rerun with the same settings skips what is finished. --demo needs nothing and shows all stages.
    """

    input: str | None = None
    """Parquet file, folder of Parquet files, or folder of images; path or fsspec URI."""
    output: str | None = None
    """Folder on a disk that all nodes share, or s3:// or gs:// URI; the demo's default is ./demo."""
    bundle: str = DEFAULT_BUNDLE
    """What to purify with: a bundle's directory, or the name of a packaged one."""
    reconstruction: Reconstruction | None = None
    """`cbpdn`, the paper's, or `unrolled`, trained on attacks; None: the bundle's default."""
    strength: Strength | None = None
    """How much is taken away, a factor, or `auto`, one for each image; None: the bundle's default."""
    top_k: int = Field(1, ge=1)
    """Reconstruct with so many nearest clusters and average."""
    precision: Precision = "float32"
    """Of the unrolled network; `bfloat16` is faster where the hardware computes in it."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many rows of the corpus."""
    batch_size: int = Field(64, ge=1)
    """Most rows per call of the encoder and the solver; decides memory, never pixels."""
    keep_original: bool = False
    """Also write the original image of every purified row, as column acsr_original."""
    doubt: str | None = None
    """Folder of calibrate_doubt: also write how likely its classifier is wrong, as column acsr_doubt."""
    target: str | None = None
    """The classifier of --doubt, as it was given to calibrate_doubt."""
    demo: bool = False
    """Build a corpus and a bundle from scikit-learn's digits, attack, purify, and write a report."""
    image_column: str = IMAGE
    """Column with the images: a struct {bytes, path} or plain binary."""
    unit_rows: int = Field(256, ge=1)
    """Most rows per unit, which is what a rerun skips or redoes as a whole."""
    unit_megabytes: float = Field(32.0, gt=0)
    """Decoded MiB aimed at per unit; units of large images have fewer rows."""
    anew: bool = False
    """Purify all of it again where the settings or the bundle are not those of the output, and replace it."""
    on_failure: OnFailure = "low_band"
    """What becomes of an image that the solver fails on: only its low band, or, unsafe, the image itself."""
    wave_units: int = Field(2048, ge=1)
    """Most units between two snapshots; bounds the driver's memory."""
    stage_timeout_s: float = Field(900.0, gt=0)
    """Seconds that a stage may work on one unit before its worker is taken for hung and killed."""
    max_removed_share: float = Field(1.0, ge=0, le=1)
    """Stop, and remove nothing, where more than this share of what was purified is no longer in the input."""
    min_free_megabytes: int = Field(256, ge=0)
    """Room that must be left on the output's disk; below it the job stops cleanly."""
    device: Device = "auto"
    """Where encoder and solver run; auto takes GPUs when the cluster has some."""
    decode: DecodeLimits = DecodeLimits()
    """Limits on encoded and decoded images."""
    decoder: DecoderSettings = DecoderSettings()
    """Bounds on the process that decodes."""
    ray: RaySettings = RaySettings()
    """Where Ray runs and how much of it to take."""

    @property
    def min_free_bytes(self) -> int:
        """`min_free_megabytes` in bytes."""
        return self.min_free_megabytes * 2**20

    @property
    def plan(self) -> UnitPlan:
        """How to cut the corpus."""
        return UnitPlan(self.image_column, self.unit_rows, self.unit_megabytes)

    @property
    def options(self) -> PurifyOptions:
        """How to purify."""
        return PurifyOptions(
            reconstruction=self.reconstruction,
            strength=self.strength,
            top_k=self.top_k,
            precision=self.precision,
        )


def purify_corpus(settings: PurifyCorpusSettings, retry: RetryRequest | None = None) -> dict[str, Any]:
    """Purify a corpus and return the closing summary.

    Args:
        settings: of the job.
        retry: do units again that were done, and nothing that is new.

    Raises:
        CorpusError: input or output that cannot be used, or another run holds the output.
        ArtifactError: a bundle that is absent or was changed.
        FailedError: units that could not be done; the others were.
        ResumableStop: a clean stop before the end, on request or because storage failed.
    """
    if not settings.input or not settings.output:
        raise CorpusError("--input and --output are needed (or --demo, which needs neither)")
    ledger = Ledger(_output_location(settings.output, settings.input))
    deciding = deciding_settings(settings)
    bound = {
        **deciding,
        "input": absolute_uri(settings.input),
        "limit": settings.limit,
        "unit_rows": settings.unit_rows,
        "unit_megabytes": settings.unit_megabytes,
    }
    load_bundle(settings.bundle).config.with_reconstruction(settings.reconstruction)
    manifest = json.loads((find_bundle(settings.bundle) / MANIFEST).read_bytes())
    order = retry or OrdinaryRun(manifest, anew=settings.anew)
    order.check(ledger, bound)
    check_there(settings.input)
    asked = NightSettings(
        settings.plan,
        json_digest(deciding),
        settings.limit,
        settings.wave_units,
        settings.max_removed_share,
    )
    started = time.perf_counter()
    with stop_request() as stop, Lease(ledger.storage) as lease, Pipelines(settings, stop) as pipelines:
        check_room(ledger.storage, settings.min_free_bytes)
        ledger.storage.check_conditional()
        # Again, and listed only now: another run may have ended since.
        order.check(ledger, bound)
        source = list_corpus(settings.input)
        if isinstance(source, ImageFolder):
            check_folder(source, settings.input, settings.image_column)
        stop.check()
        asked = order.begin(ledger, asked, bound, deciding)

        def purify_units(units: list[Unit], parked: frozenset[str]) -> Iterator[pa.Table]:
            writer = {
                "output": ledger.output,
                "fingerprint": asked.fingerprint,
                "image_column": settings.image_column,
                "keep_original": settings.keep_original,
                "parked": parked,
                "lease": lease.number,
            }
            return pipelines.run(units, writer, ledger.storage)

        night = Night(asked, ledger, lease, stop, purify_units)
        night.run(source)
        order.finish(ledger)
        elapsed = time.perf_counter() - started
        summary = night.summary(elapsed)
        ledger.report({**bound, **summary, "elapsed_s": round(elapsed, 1)})
    if night.failed:
        shown = "; ".join(f"{name}: {why}" for name, why in islice(night.failed.items(), SHOWN_FAILURES))
        raise FailedError(f"{len(night.failed)} units failed, the others are done: {shown}")
    return summary


class Pipelines:
    """Ray, from the first wave that needs it to the end of the run.

    Args:
        settings: of the job.
        stop: listens again after Ray has taken the signal.
    """

    def __init__(self, settings: PurifyCorpusSettings, stop: StopRequest) -> None:
        self._settings, self._stop = settings, stop
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
            self._overseer = start_overseer(storage.root)
        shares = share_resources(settings.device, settings.ray, len(units))
        logger.info("batch size %d, %s", settings.batch_size, shares)
        context = ray.data.DataContext.get_current()
        # The watchdog acts long before; this is for a cluster that gives no actor a place.
        context.execution_no_progress_timeout_s = max(1800.0, 4 * settings.stage_timeout_s)
        pipeline = build_pipeline(settings, units, writer, shares, self._overseer)
        limits = Limits(settings.stage_timeout_s, settings.min_free_bytes)
        yield from run_wave(pipeline, self._overseer, storage, self._stop, limits)


def deciding_settings(settings: PurifyCorpusSettings) -> dict[str, Any]:
    """Return what decides the rows of a unit's output; its digest is the run's fingerprint."""
    return {
        "algorithm_version": ALGORITHM_VERSION,
        "bundle_digest": bundle_digest(settings.bundle),
        # Only what differs from the defaults, so that a new limit leaves older outputs valid.
        "decode": settings.decode.model_dump(mode="json", exclude_defaults=True),
        "image_column": settings.image_column,
        "keep_original": settings.keep_original,
        **({} if settings.on_failure == "low_band" else {"on_failure": settings.on_failure}),
        **load_bundle(settings.bundle).config.changed(settings.options),
        **doubt_settings(settings.doubt, settings.target, settings.bundle, settings.options),
    }


def _output_location(output: str, source: str) -> str:
    path, origin = absolute_uri(output), absolute_uri(source).removesuffix("/")
    if f"{path}/".startswith(f"{origin}/"):
        raise CorpusError(f"--output {path} lies inside --input {origin}")
    return path


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
        "batch_size": settings.batch_size,
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
    select: Stage = (SelectClusters, {"bundle": bundle, "threads": threads, "options": settings.options})
    purify: Stage = (PurifyImages, purifying)
    if settings.doubt is not None:
        # Workers have other working directories.
        target = settings.target and absolute_location(settings.target)
        doubt = str(Path(settings.doubt).resolve())
        purify = PurifyWithDoubt, {"purify": purifying, "doubt": doubt, "target": target}
    if shares.encode_actors:
        encoded = map_in_actors(
            decoded,
            encode,
            cpus=shares.encode_cpus,
            gpus=shares.encode_gpus,
            **watched("middle", shares.encode_actors),
        )
        selected = map_in_actors(encoded, select, cpus=shares.select_cpus, **watched("middle", 1))
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
