"""The job: which parts, at which sizes, beside which peer; and how many GPUs a night takes."""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import Field

from acsr_ray.artifacts import atomic_write
from acsr_ray.benchmark.choice import benchmark_codec, benchmark_selection
from acsr_ray.benchmark.learning import benchmark_cdl
from acsr_ray.benchmark.network import benchmark_purifier, benchmark_unrolled
from acsr_ray.benchmark.report import Row, measure_ceilings, to_table
from acsr_ray.benchmark.solver import benchmark_solver
from acsr_ray.benchmark.stream import benchmark_pipeline
from acsr_ray.config import ConfigError, Device, JobSettings
from acsr_ray.evaluation.tables import to_markdown
from acsr_ray.purification.bundle import DEFAULT_BUNDLE, load_bundle
from acsr_ray.purification.options import Reconstruction

logger = logging.getLogger(__name__)

Part = Literal["solver", "unrolled", "purifier", "cdl", "selection", "codec", "pipeline"]
PARTS: tuple[Part, ...] = ("solver", "unrolled", "purifier", "cdl", "selection", "codec", "pipeline")


class BenchmarkSettings(JobSettings):
    """Time the parts beside their peers in the same run, and say how many GPUs a night takes."""

    parts: Annotated[tuple[Part, ...], tyro.conf.Positional] = PARTS
    """What to time; all when omitted."""
    sizes: tuple[int, ...] = (32, 64, 128, 224)
    """Sides of the images in pixels; cdl and pipeline take the first alone."""
    shard: str | None = None
    """Parquet shard with column `image` whose crops solver and cdl code; default: scikit-learn's photos."""
    peer: Literal["sporco", "none"] = "none"
    """What solver and cdl are compared with; needs acsr-ray[sporco]."""
    bundle: str = DEFAULT_BUNDLE
    """Whose encoder, network and first dictionary are timed."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU if there is one. Codec stays on CPUs."""
    cores: int | None = Field(None, ge=1)
    """Cores that either side takes, except in pipeline; default: all that this process may use."""
    repeats: int = Field(3, ge=1)
    """Timed runs of each side, in turns; the median counts."""
    epochs: int = Field(3, ge=1)
    """Passes of the peer in cdl."""
    images: int = Field(50_000, ge=1)
    """Images of pipeline."""
    reconstruction: Reconstruction = "unrolled"
    """What pipeline purifies with."""
    actors: int | None = Field(None, ge=1)
    """Purification actors of pipeline; default: one per GPU, or one per CPU."""
    unit_rows: int = Field(256, ge=1)
    """Rows per unit of pipeline."""
    night_images: float = Field(1e8, gt=0)
    """Images of a night."""
    night_hours: float = Field(8.0, gt=0)
    """Hours of a night."""
    json_file: Path | None = None
    """Also write everything measured to this file, as JSON."""


def benchmark(settings: BenchmarkSettings) -> dict[str, Any]:
    """Run the benchmark, print the table and return a summary.

    Raises:
        ConfigError: a GPU was asked for and there is none, or a peer cannot do its part.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but there is no GPU")
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    cores = settings.cores or len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        ceilings = measure_ceilings(device)
        rows = []
        for row in _rows(settings, device, cores):
            rows.append(row)
            logger.info("%s %s %d: %.4g images/s, ratio %s", row.part, row.what, row.side, *_short(row))
    finally:
        torch.set_num_threads(before)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{cores} cores"
    print(to_markdown(to_table(rows, ceilings, f"Benchmark on {machine}")))
    night = _night(rows, settings, device, cores)
    if settings.json_file is not None:
        content = {
            "machine": machine,
            "device": device,
            "ceilings": {"flops": ceilings.flops, "bytes": ceilings.bytes},
            "settings": settings.model_dump(mode="json", exclude={"config", "json_file"}),
            "rows": [row.as_json(ceilings) for row in rows],
            "night": night,
        }
        atomic_write(settings.json_file, json.dumps(content, indent=1).encode())
    return {"measurements": len(rows), **night}


def _rows(settings: BenchmarkSettings, device: str, cores: int) -> Iterator[Row]:
    repeats, first = settings.repeats, settings.sizes[0]
    if "solver" in settings.parts:
        atoms = load_bundle(settings.bundle).atoms[0]
        for side in settings.sizes:
            yield benchmark_solver(
                atoms,
                side,
                shard=settings.shard,
                device=device,
                peer=settings.peer,
                cores=cores,
                repeats=repeats,
            )
    if "unrolled" in settings.parts:
        for side in settings.sizes:
            yield from benchmark_unrolled(settings.bundle, side, device=device, repeats=repeats)
    if "purifier" in settings.parts:
        for side in settings.sizes:
            yield from benchmark_purifier(settings.bundle, side, device=device, repeats=repeats)
    if "cdl" in settings.parts:
        yield benchmark_cdl(
            first, shard=settings.shard, device=device, peer=settings.peer, epochs=settings.epochs
        )
    if "selection" in settings.parts:
        yield benchmark_selection(settings.bundle, device=device, repeats=repeats)
    if "codec" in settings.parts:
        for side in settings.sizes:
            yield from benchmark_codec(side, repeats=repeats)
    if "pipeline" in settings.parts:
        yield benchmark_pipeline(
            settings.bundle,
            first,
            count=settings.images,
            reconstruction=settings.reconstruction,
            repeats=repeats,
            device=device,
            actors=settings.actors,
            unit_rows=settings.unit_rows,
        )


def _night(rows: Sequence[Row], settings: BenchmarkSettings, device: str, cores: int) -> dict[str, str]:
    """Say what a night takes, by the whole pipeline where it was timed, else by encoder and network."""
    seconds = {(row.part, row.what): row.seconds for row in rows if row.side == settings.sizes[0]}
    whole = [row for row in rows if row.part == "pipeline"]
    parts = [seconds.get(("unrolled", what)) for what in ("encoder", "network, float32")]
    if whole:
        cores = len(os.sched_getaffinity(0))
        per_image, basis = whole[0].seconds, "the whole pipeline"
    elif None not in parts:
        per_image, basis = sum(part for part in parts if part), "encoder and network alone"
    else:
        return {}
    machines = settings.night_images * per_image / (settings.night_hours * 3600)
    night = f"{settings.night_images:.3g} images of {settings.sizes[0]} pixels in {settings.night_hours:g} h"
    if device == "cuda":
        beside = f" with {cores} CPUs each" if whole else ""
        return {night: f"{math.ceil(machines)} GPUs like this one{beside}, by {basis}"}
    needed = math.ceil(machines * cores)
    return {night: f"{needed} cores like these, by {basis}; on GPUs nothing was measured here"}


def _short(row: Row) -> tuple[float, str]:
    return 1 / row.seconds, "-" if row.ratio is None else f"{row.ratio:.3g}"
