"""The whole job on Ray beside the bare purifier in processes of the same cores; its memory over a run."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import torch

from acsr_ray.benchmark.pictures import crops, images
from acsr_ray.benchmark.report import Row
from acsr_ray.benchmark.timing import Side, alternate, in_processes, timed
from acsr_ray.corpus.writing import write_shard
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.options import PurifyOptions, Reconstruction
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.stages import BATCH_SIZE

SHARD_ROWS = 5000
BATCH = 64
GPU_SAMPLE = 4096
"""Images of the bare purifier on a GPU."""
SAMPLE_SECONDS = 1.0
SHARED_MEMORY = "/dev/shm"
DISTINCT = 2000
"""Images drawn; shards repeat them, for drawing takes longer than purifying would wait."""


def benchmark_pipeline(
    bundle: str,
    side: int,
    *,
    count: int,
    reconstruction: Reconstruction,
    repeats: int,
    device: str = "cpu",
    actors: int | None = None,
    unit_rows: int = 256,
) -> Row:
    """Return the row of one job over `count` images, with the bare purifier as its peer.

    Args:
        bundle: directory or name.
        side: of the images.
        count: of the images.
        reconstruction: `unrolled` or `cbpdn`.
        repeats: timed runs of the bare purifier, before and after the job.
        device: `cpu`, or `cuda` for the job and a single bare process on a GPU.
        actors: of the job; by default one per GPU, or one per CPU.
        unit_rows: of the job.
    """
    # As many processes as the job's Ray has CPUs, if they compute.
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        source = write_corpus(Path(folder) / "in", count, side)
        sample = max(BATCH, min(count, 1000) // cores) if device == "cpu" else GPU_SAMPLE
        parts = [(bundle, side, sample, reconstruction, device)] * cores
        bare = stack.enter_context(in_processes(purifier_side, parts))
        before = alternate({"bare": bare}, repeats)["bare"]
        settings = PurifyCorpusSettings(
            input=str(source),
            output=f"{folder}/out",
            bundle=bundle,
            reconstruction=reconstruction,
            device="cuda" if device == "cuda" else "cpu",
            unit_rows=unit_rows,
            ray=RaySettings(actors=actors),
        )
        started = time.perf_counter()
        with ray_session(settings.ray):
            summary = purify_corpus(settings)
        whole = time.perf_counter() - started
        after = alternate({"bare": bare}, repeats)["bare"]
        assert summary["images"] == count
    per_image = (before + after) / 2 / (parts[0][2] * cores)
    return Row(
        "pipeline",
        f"purify_corpus, {reconstruction}, {count} images",
        side,
        count,
        whole / count,
        f"encode, select, reconstruct in {cores} bare processes"
        if device == "cpu"
        else "encode, select, reconstruct in one bare process on the GPU",
        per_image,
        note=f"the start of Ray and its workers included; images/s by its own report {summary['images/s']}",
    )


def write_corpus(directory: Path, count: int, side: int) -> Path:
    """Write shards of `count` crops and return their folder."""
    directory.mkdir()
    pixels = crops(min(count, DISTINCT), side)

    def write(first: int) -> None:
        rows = range(first, min(first + SHARD_ROWS, count))
        names = tuple(f"{row:08d}" for row in rows)
        shard = pixels[[row % len(pixels) for row in rows]]
        labels = torch.zeros(len(rows), dtype=torch.int64).numpy()
        write_shard(directory / f"part-{first:08d}.parquet", shard, labels, names, ("photo",))

    # Encoding leaves the interpreter to others.
    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(0, count, SHARD_ROWS)))
    return directory


def purifier_side(
    bundle: str, side: int, count: int, reconstruction: Reconstruction, device: str = "cpu"
) -> Side:
    """Return a side that purifies `count` images in batches, as a stage's actor does."""
    options = PurifyOptions(reconstruction=reconstruction)
    purifier = Purifier(load_bundle(bundle), device, options=options)
    batches = images(count, side).split(BATCH_SIZE[device])

    @torch.inference_mode()
    def work() -> None:
        for batch in batches:
            purifier.purify(batch)

    return timed(work, device)


@contextmanager
def watched_memory() -> Iterator[dict[str, float]]:
    """Yield a dict that, afterwards, holds the largest MiB of the driver, any worker and the object store.

    The driver is this process, workers are its descendants; the object store is what lies in shared memory,
    where a local Ray keeps it on Linux.
    """
    largest = {"driver": 0.0, "worker": 0.0, "object store": 0.0}
    stop = threading.Event()

    def watch() -> None:
        own = psutil.Process()
        while not stop.wait(SAMPLE_SECONDS):
            _note(largest, "driver", _own_memory(own))
            for child in own.children(recursive=True):
                try:
                    if child.name().startswith("ray::"):
                        _note(largest, "worker", _own_memory(child))
                except psutil.NoSuchProcess:
                    continue
            _note(largest, "object store", psutil.disk_usage(SHARED_MEMORY).used)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield largest
    finally:
        stop.set()
        watcher.join()


def _own_memory(process: psutil.Process) -> int:
    """Return the bytes of a process without what it shares, which is the object store above all."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def _note(largest: dict[str, float], what: str, size: float) -> None:
    largest[what] = max(largest[what], size / 2**20)
