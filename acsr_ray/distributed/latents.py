"""Latents of labelled shards as a Ray Data pass to Parquet: read -> decode -> encode and write."""

import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from acsr_ray.artifacts import artifact_digest, json_digest
from acsr_ray.clustering.gaussians import GaussianMoments
from acsr_ray.columns import IMAGE, LABEL, UNIT
from acsr_ray.config import Device
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import Unit, plan_units
from acsr_ray.distributed.blocks import map_in_actors, unit_blocks
from acsr_ray.distributed.runtime import RaySettings, share_resources
from acsr_ray.models.classifier import encode, load_classifier
from acsr_ray.purification.stages import DecodeImages, ReadUnits, batches_by_size

logger = logging.getLogger(__name__)

TRAINING_DATA = "training_data_digest"
"""Key of a manifest: `labelled_data_digest` of the shards that an artifact was made from."""

UNIT_ROWS = 500
BATCH_ROWS = 256


@dataclass(frozen=True)
class Latents:
    """Latents (N, L) float32 of N images, a file per unit; only which image a row is of is in memory."""

    files: tuple[Path, ...]
    shards: tuple[str, ...]
    """Shard of each file's images."""
    file: NDArray[np.int64]
    """(N,) file of each image; they come in the order of the files."""
    rows: NDArray[np.int64]
    """(N,) row of its shard."""
    labels: NDArray[np.int64]
    """(N,) class."""
    length: int
    """L."""

    def __len__(self) -> int:
        return len(self.labels)

    def image_shards(self) -> list[str]:
        """Return the shard of each image."""
        return [self.shards[file] for file in self.file.tolist()]

    def parts(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield where a file's images are among all, and their latents (n, L)."""
        start = 0
        for file in self.files:
            latents = _column(pq.read_table(file, columns=["latent"]))
            if len(latents):
                yield slice(start, start + len(latents)), latents
            start += len(latents)

    def of_class(self, label: int) -> NDArray[np.float32]:
        """Return the latents (n, L) of one class, in order."""
        chosen = [
            latents[mine]
            for rows, latents in self.parts()
            if (mine := np.flatnonzero(self.labels[rows] == label)).size
        ]
        return np.concatenate(chosen)

    def gaussian_moments(self, cluster_id: NDArray[np.int32]) -> GaussianMoments:
        """Return the sums over every (class, cluster), in one pass over the files.

        Args:
            cluster_id: (N,) cluster of each image within its class.
        """
        keys, index = np.unique(np.stack([self.labels, cluster_id], 1), axis=0, return_inverse=True)
        moments = GaussianMoments(keys, self.length)
        for rows, latents in self.parts():
            moments.add(latents, index.reshape(-1)[rows])
        return moments


def _column(table: pa.Table) -> NDArray[np.float32]:
    column = table["latent"].combine_chunks()
    latents: NDArray[np.float32] = column.flatten().to_numpy()
    return latents.reshape(len(column), column.type.list_size)


class EncodeLatents:
    """Write the latents of one unit.  Reads PIXELS, LABEL, UNIT.  Gives the number of images."""

    def __init__(self, classifier: str, kind: str, device: str, threads: int, folder: str) -> None:
        torch.set_num_threads(threads)
        loaded = load_classifier(Path(classifier), kind, device)
        self.model, self.image_size = loaded.model, loaded.config.image_size
        self.device, self.folder = device, Path(folder)

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        """Keep the rows that were decoded, with their latents."""
        (text,) = table[UNIT].unique().to_pylist()
        unit = Unit.from_json(text)
        latents = np.zeros((table.num_rows, self.model.latent_length), np.float32)
        decoded = np.zeros(table.num_rows, bool)
        for rows, images in batches_by_size(table, BATCH_ROWS):
            latents[rows] = encode(self.model, images.to(self.device), self.image_size).cpu().numpy()
            decoded[rows] = True
        kept = np.flatnonzero(decoded)
        flat = pa.array(latents[kept].reshape(-1), pa.float32())
        columns = {
            "row": pa.array(unit.first + kept, pa.int64()),
            LABEL: table[LABEL].take(pa.array(kept)).cast(pa.int64()),
            "latent": pa.FixedSizeListArray.from_arrays(flat, latents.shape[1]),
        }
        _write(self.folder / _part_name(unit), pa.table(columns))
        return pa.table({"images": [len(kept)]})


def _part_name(unit: Unit) -> str:
    return f"{json_digest([unit.uri, unit.first, unit.last, unit.content])[:16]}.parquet"


def _write(path: Path, table: pa.Table) -> None:
    # A name of its own, as a task that was given up may still be writing.
    staging = path.with_name(f".{uuid.uuid4().hex}")
    pq.write_table(table, staging)
    staging.replace(path)


def compute_latents(
    locations: Sequence[str],
    classifier: Path,
    kind: str,
    *,
    cache: Path,
    device: Device,
    settings: RaySettings,
) -> Latents:
    """Encode labelled shards; units that were encoded before by the same network are not done again.

    Args:
        locations: labelled Parquet files or folders of them.
        classifier: artifact directory.
        kind: `baseline` or `robust`.
        cache: folder for the latents, seen by every worker: a sub-folder per network, a file per unit.
        device: where to encode.
        settings: how much of Ray to take; a session must be open.

    Raises:
        CorpusError: a shard without labels, or not one readable image.
    """
    units = [unit for location in locations for unit in _labelled_units(location)]
    folder = cache.resolve() / f"latents.{artifact_digest(classifier)[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / _part_name(unit) for unit in units)
    missing = [unit for unit, file in zip(units, files, strict=True) if not file.exists()]
    logger.info("latents: %d units, %d encoded before", len(units), len(units) - len(missing))
    if missing:
        _encode(missing, classifier, kind, device, settings, folder)
    tables = [pq.read_table(file, columns=["row", LABEL]) for file in files]
    if any(table[LABEL].null_count for table in tables):
        raise CorpusError(f"{', '.join(locations)} has rows without a label")
    found = pa.concat_tables(tables)
    if not len(found):
        raise CorpusError(f"{', '.join(locations)} has no readable image")
    return Latents(
        files,
        tuple(unit.uri for unit in units),
        np.repeat(np.arange(len(files)), [len(table) for table in tables]),
        found["row"].to_numpy(),
        found[LABEL].to_numpy(),
        pq.read_schema(files[0]).field("latent").type.list_size,
    )


def labelled_data_digest(locations: Sequence[str]) -> str:
    """Return a digest of the shards' bytes, whatever they are called and wherever they lie."""
    units = [unit for location in locations for unit in _labelled_units(location)]
    return json_digest(sorted({unit.content for unit in units}))


def _labelled_units(location: str) -> list[Unit]:
    return plan_units(location, image_column=IMAGE, unit_rows=UNIT_ROWS, unit_megabytes=32.0, limit=None)


def _encode(
    units: list[Unit], classifier: Path, kind: str, device: Device, settings: RaySettings, folder: Path
) -> None:
    shares = share_resources(device, settings, len(units))
    decoded = map_in_actors(
        unit_blocks(units),
        (ReadUnits, {}),
        (DecodeImages, {"image_column": IMAGE, "limits": DecodeLimits()}),
        actors=shares.codec_actors,
        cpus=shares.codec_cpus,
    )
    options = {
        "classifier": str(classifier.resolve()),
        "kind": kind,
        "device": shares.device,
        "threads": settings.threads_per_actor,
        "folder": str(folder),
    }
    encoded = map_in_actors(
        decoded,
        (EncodeLatents, options),
        actors=shares.purify_actors,
        cpus=shares.purify_cpus,
        gpus=shares.purify_gpus,
    )
    for _ in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        pass
