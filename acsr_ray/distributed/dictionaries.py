"""One convolutional dictionary per cluster, each learnt by its own Ray task (Eq. 5)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from pydantic import Field

from acsr_ray.artifacts import json_digest, load_tensors, save_tensors
from acsr_ray.config import AcsrError, Described
from acsr_ray.corpus.images import DecodeLimits, to_unit_range
from acsr_ray.corpus.rows import crop_alike, read_rows
from acsr_ray.distributed.runtime import GPU_DEVICE, check_task
from acsr_ray.sparse.cdl import CdlConfig, learn_dictionary
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split

logger = logging.getLogger(__name__)


class DictionaryConfig(Described):
    """How each cluster's dictionary is learnt."""

    images: int = Field(200, ge=1)
    """Images per dictionary, drawn from the cluster with the seed."""
    crop: int = Field(64, ge=8)
    """Side of the square cut from each image; smaller images are used whole."""
    cdl: CdlConfig = CdlConfig()
    """Dictionary learning."""
    tikhonov: TikhonovConfig = TikhonovConfig()
    """Split whose high band is learnt; the purifier uses the same."""
    task_cpus: float = Field(1.0, gt=0)
    """CPUs of one task."""
    task_gpus: float = Field(0.0, ge=0)
    """GPU share of one task; above 0 the task computes on the GPU."""


@dataclass(frozen=True)
class ClusterImages:
    """The images of one cluster: (class, cluster), name, and (shard URI, row) of each."""

    class_id: int
    cluster_id: int
    rows: tuple[tuple[str, int], ...]


class DictionaryError(AcsrError, RuntimeError):
    """Some clusters have no dictionary; the message names them and why. The others are kept."""


def learn_cluster_dictionary(
    rows: Sequence[tuple[str, int]], config: DictionaryConfig, seed: int, device: str
) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    """Learn one dictionary from rows of shards; the body of a Ray task.

    Returns:
        Atoms (M, 3, h, w) and the objective of each mini-batch.
    """
    torch.set_num_threads(max(1, int(config.task_cpus)))
    images = read_rows(rows, DecodeLimits())
    pixels = crop_alike(images, config.crop, config.cdl.window, seed)
    signal = torch.from_numpy(to_unit_range(pixels)).to(device)
    _, highpass = tikhonov_split(signal, config.tikhonov)
    result = learn_dictionary(highpass, config.cdl, seed=seed)
    return result.atoms.cpu().numpy(), result.objective


def learn_dictionaries(
    clusters: Sequence[ClusterImages],
    config: DictionaryConfig,
    directory: Path,
    *,
    seed: int,
    max_in_flight: int,
    learn: Callable[..., tuple[NDArray[np.float32], tuple[float, ...]]] = learn_cluster_dictionary,
) -> list[Path]:
    """Learn every cluster's dictionary, a bounded number at a time, and save each on arrival.

    A file's name holds a digest of the cluster's rows and the settings, so a rerun skips what is there and
    relearns what changed. A task whose node dies is retried by Ray; one that raises is reported at the end.

    Args:
        clusters: what to learn from.
        config: how.
        directory: where the files go.
        seed: fixes sampling and start of every dictionary.
        max_in_flight: most tasks at a time.
        learn: the body of a task.

    Returns:
        One safetensors file per cluster, in the order given.

    Raises:
        DictionaryError: a task failed; finished dictionaries stay for the next run.
        ResourceError: no node can hold a task.
    """
    check_task("dictionary learning", config.task_cpus, config.task_gpus)
    paths = [directory / _file_name(cluster, config, seed) for cluster in clusters]
    pending = [k for k, path in enumerate(paths) if not path.exists()]
    logger.info("%d dictionaries, %d finished before", len(paths), len(paths) - len(pending))
    task = ray.remote(learn).options(num_cpus=config.task_cpus, num_gpus=config.task_gpus, max_retries=3)
    device = GPU_DEVICE if config.task_gpus > 0 else "cpu"
    # Largest first, so that the last task to start is a short one.
    waiting = sorted(pending, key=lambda k: -len(clusters[k].rows))
    running: dict[ray.ObjectRef[Any], int] = {}
    failed: dict[int, str] = {}
    while waiting or running:
        while waiting and len(running) < max_in_flight:
            k = waiting.pop(0)
            rows = _sample(clusters[k].rows, config.images, _seed_of(clusters[k], seed))
            running[task.remote(rows, config, _seed_of(clusters[k], seed), device)] = k
        (done,), _ = ray.wait(list(running), num_returns=1)
        k = running.pop(done)
        name = f"class {clusters[k].class_id} cluster {clusters[k].cluster_id}"
        try:
            atoms, objective = ray.get(done)
        except ray.exceptions.RayError as error:
            failed[k] = f"{name}: {str(error).splitlines()[-1]}"
            continue
        stats = torch.tensor(objective, dtype=torch.float32)
        save_tensors(paths[k], {"atoms": torch.from_numpy(np.array(atoms)), "objective": stats})
        logger.info("dictionary of %s: mean objective %.3f -> %.3f", name, *_first_and_last(objective))
    if failed:
        raise DictionaryError("; ".join(failed[k] for k in sorted(failed)))
    return paths


def load_dictionaries(paths: Sequence[Path]) -> torch.Tensor:
    """Return the atoms (K, M, 3, h, w) of saved dictionaries."""
    return torch.stack([load_tensors(path)["atoms"] for path in paths])


def _first_and_last(objective: Sequence[float]) -> tuple[float, float]:
    """Return the means over the first and last quarter; single mini-batches differ by their images."""
    quarter = max(1, len(objective) // 4)
    return float(np.mean(objective[:quarter])), float(np.mean(objective[-quarter:]))


def _seed_of(cluster: ClusterImages, seed: int) -> int:
    return (seed * 1_000_003 + cluster.class_id * 1009 + cluster.cluster_id) % 2**31


def _sample(rows: Sequence[tuple[str, int]], count: int, seed: int) -> list[tuple[str, int]]:
    if len(rows) <= count:
        return list(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return [rows[position] for position in sorted(chosen.tolist())]


def _file_name(cluster: ClusterImages, config: DictionaryConfig, seed: int) -> str:
    # Resources decide where a dictionary is learnt, not what it is.
    settings = config.model_dump(mode="json", exclude={"task_cpus", "task_gpus"})
    digest = json_digest([list(cluster.rows), settings, seed])[:8]
    return f"class-{cluster.class_id:04d}.cluster-{cluster.cluster_id:02d}.{digest}.safetensors"
