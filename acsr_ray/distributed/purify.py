"""Purify a corpus on Ray Data: read -> decode -> encode -> select -> purify -> write, one block per unit."""

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field
from ray.data import Dataset

from acsr_ray.artifacts import json_digest
from acsr_ray.columns import IMAGE
from acsr_ray.config import Device, JobSettings
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.ledger import Ledger, Receipt, total
from acsr_ray.corpus.sources import CorpusError, absolute_uri
from acsr_ray.corpus.units import Unit, plan_units
from acsr_ray.distributed.blocks import Stage, map_in_actors, unit_blocks
from acsr_ray.distributed.runtime import (
    RaySettings,
    StageShares,
    ray_session,
    share_resources,
)
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
    PurifyImages,
    ReadUnits,
    SelectClusters,
    WriteUnits,
)

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0


class PurifyCorpusSettings(JobSettings):
    """Purify a corpus of images with a bundle: OUTPUT/data gets one Parquet file per unit of rows.

    A rerun with the same settings skips what is finished. --demo needs nothing and shows all stages.
    """

    input: str | None = None
    """Parquet file, folder of Parquet files, or folder of images; path or fsspec URI."""
    output: str | None = None
    """Folder for the result, on a disk that all nodes share; the demo's default is ./demo."""
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
    device: Device = "auto"
    """Where encoder and solver run; auto takes GPUs when the cluster has some."""
    decode: DecodeLimits = DecodeLimits()
    """Limits on encoded and decoded images."""
    ray: RaySettings = RaySettings()
    """Where Ray runs and how much of it to take."""

    @property
    def options(self) -> PurifyOptions:
        """How to purify."""
        return PurifyOptions(
            reconstruction=self.reconstruction,
            strength=self.strength,
            top_k=self.top_k,
            precision=self.precision,
        )


def purify_corpus(settings: PurifyCorpusSettings) -> dict[str, Any]:
    """Purify a corpus and return the closing summary.

    Raises:
        CorpusError: input or output that cannot be used; nothing was written then.
        ArtifactError: a bundle that is absent or was changed.
    """
    if not settings.input or not settings.output:
        raise CorpusError("--input and --output are needed (or --demo, which needs neither)")
    output = _local_output(settings.output, settings.input)
    ledger = Ledger(output)
    deciding = deciding_settings(settings)
    bound = {
        **deciding,
        "input": absolute_uri(settings.input),
        "limit": settings.limit,
        "unit_rows": settings.unit_rows,
        "unit_megabytes": settings.unit_megabytes,
    }
    load_bundle(settings.bundle).config.with_reconstruction(settings.reconstruction)
    ledger.check(bound)
    units = plan_units(
        settings.input,
        image_column=settings.image_column,
        unit_rows=settings.unit_rows,
        unit_megabytes=settings.unit_megabytes,
        limit=settings.limit,
        known=ledger.known_shards(),
    )
    ledger.claim(bound)
    fingerprint = json_digest(deciding)
    names = {unit.output_name(fingerprint): unit for unit in units}
    finished = ledger.finished() & names.keys()
    pending = [unit for name, unit in names.items() if name not in finished]
    superseded = frozenset(name.split(".rows-")[0] for name in ledger.published() - names.keys())
    logger.info("%d units, %d finished before", len(units), len(finished))
    started = time.perf_counter()
    if pending:
        writer = {
            "output": output,
            "fingerprint": fingerprint,
            "image_column": settings.image_column,
            "keep_original": settings.keep_original,
            "parked": superseded,
        }
        _run(settings, pending, writer)
    elapsed = time.perf_counter() - started
    receipts = [ledger.receipt(name) for name in names]
    summary = _summary(receipts, names, finished, elapsed, str(ledger.data))
    ledger.commit(receipts, {u.uri: (u.version, u.content) for u in units if u.version})
    ledger.report({**bound, **summary, "elapsed_s": round(elapsed, 1)})
    return summary


def deciding_settings(settings: PurifyCorpusSettings) -> dict[str, Any]:
    """Return what decides the rows of a unit's output; its digest is the run's fingerprint."""
    return {
        "algorithm_version": ALGORITHM_VERSION,
        "bundle_digest": bundle_digest(settings.bundle),
        "decode": settings.decode.model_dump(mode="json"),
        "image_column": settings.image_column,
        "keep_original": settings.keep_original,
        # Only what differs from the defaults, so that a new option leaves older outputs valid.
        **load_bundle(settings.bundle).config.changed(settings.options),
        **doubt_settings(settings.doubt, settings.target, settings.bundle, settings.options),
    }


def _local_output(output: str, source: str) -> str:
    path = absolute_uri(output)
    if "://" in path:
        raise CorpusError(f"--output must be a folder on a shared disk, got {output}")
    origin = absolute_uri(source).removesuffix("/")
    if f"{path}/".startswith(f"{origin}/"):
        raise CorpusError(f"--output {path} lies inside --input {origin}")
    return path


def _run(settings: PurifyCorpusSettings, units: list[Unit], writer: dict[str, Any]) -> None:
    with ray_session(settings.ray):
        shares = share_resources(settings.device, settings.ray, len(units))
        logger.info("batch size %d, %s", settings.batch_size, shares)
        rows, started, reported = 0, time.perf_counter(), time.perf_counter()
        planned = sum(unit.num_rows for unit in units)
        for rows_done in _published_rows(build_pipeline(settings, units, writer, shares)):
            rows += rows_done
            now = time.perf_counter()
            if now - reported >= PROGRESS_SECONDS:
                reported = now
                rate = rows / (now - started)
                left = (planned - rows) / rate
                logger.info("%d of %d images, %.1f/s, %.0f s left", rows, planned, rate, left)


def _published_rows(pipeline: Dataset) -> Iterator[int]:
    tables: Iterable[pa.Table] = pipeline.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    for table in tables:
        yield from table["rows"].to_pylist()


def build_pipeline(
    settings: PurifyCorpusSettings,
    units: list[Unit],
    writer: dict[str, Any],
    shares: StageShares,
) -> Dataset:
    """Return the lazy pipeline from units to one row (name, rows) per published unit."""
    bundle = str(find_bundle(settings.bundle))
    threads = settings.ray.threads_per_actor
    model = {
        "bundle": bundle,
        "device": shares.device,
        "threads": threads,
        "batch_size": settings.batch_size,
        "options": settings.options,
    }
    decoded = map_in_actors(
        unit_blocks(units),
        (ReadUnits, {}),
        (DecodeImages, {"image_column": settings.image_column, "limits": settings.decode}),
        actors=shares.codec_actors,
        cpus=shares.codec_cpus,
    )
    encode: Stage = (EncodeImages, model)
    select: Stage = (SelectClusters, {"bundle": bundle, "threads": threads, "options": settings.options})
    purify: Stage = (PurifyImages, model)
    if settings.doubt is not None:
        # Workers have other working directories.
        target = settings.target and absolute_location(settings.target)
        doubt = str(Path(settings.doubt).resolve())
        purify = PurifyWithDoubt, {"purify": model, "doubt": doubt, "target": target}
    if shares.encode_actors:
        encoded = map_in_actors(
            decoded,
            encode,
            actors=shares.encode_actors,
            cpus=shares.encode_cpus,
            gpus=shares.encode_gpus,
        )
        selected = map_in_actors(encoded, select, actors=1, cpus=shares.select_cpus)
        stages, cpus = [purify], shares.purify_cpus
    else:
        selected, stages = decoded, [encode, select, purify]
        cpus = shares.encode_cpus + shares.purify_cpus
    purified = map_in_actors(
        selected, *stages, actors=shares.purify_actors, cpus=cpus, gpus=shares.purify_gpus
    )
    write: Stage = (WriteUnits, writer)
    return map_in_actors(purified, write, actors=shares.codec_actors, cpus=shares.codec_cpus)


def _summary(
    receipts: list[Receipt],
    names: dict[str, Unit],
    finished: set[str],
    elapsed: float,
    data: str,
) -> dict[str, Any]:
    new = sum(unit.num_rows for name, unit in names.items() if name not in finished)
    sums = total(receipts)
    planned = sum(unit.num_rows for unit in names.values())
    if sums["rows"] != planned:
        raise RuntimeError(f"{sums['rows']} rows were published of {planned}; see {data}")
    return {
        "images": sums["rows"],
        "statuses": sums["statuses"],
        "quarantined": sums["quarantined"],
        "this run": f"{new} images in {len(names) - len(finished)} units"
        if new
        else "nothing to do, every unit was finished before",
        "images/s": round(new / elapsed, 1) if new else 0.0,
        "output": data,
    }
