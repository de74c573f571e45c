"""Latents of labelled shards as a Ray Data pass: read -> decode -> encode."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from acsr_ray.artifacts import artifact_digest, json_digest
from acsr_ray.columns import IMAGE, LABEL, UNIT
from acsr_ray.config import Device
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import Unit, plan_units
from acsr_ray.distributed.blocks import map_in_actors, map_in_tasks, unit_blocks
from acsr_ray.distributed.runtime import RaySettings, share_resources
from acsr_ray.models.classifier import encode, load_classifier
from acsr_ray.purification.stages import DecodeImages, ReadUnits, batches_by_size

UNIT_ROWS = 500
BATCH_ROWS = 256


@dataclass(frozen=True)
class Latents:
    """Latents of N images: `latents` (N, L) float32, `labels` (N,), and the row of the shard each is from."""

    latents: NDArray[np.float32]
    labels: NDArray[np.int64]
    shards: tuple[str, ...]
    rows: NDArray[np.int64]


class EncodeLatents:
    """Compute a classifier's latents.  Reads PIXELS, LABEL, UNIT.  Gives shard, row, LABEL, latent."""

    def __init__(self, classifier: str, kind: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        loaded = load_classifier(Path(classifier), kind, device)
        self.model, self.image_size = loaded.model, loaded.config.image_size
        self.device = device

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        """Keep the rows that were decoded, with their latents."""
        (text,) = table[UNIT].unique().to_pylist()
        unit = Unit.from_json(text)
        latents: dict[int, NDArray[np.float32]] = {}
        for rows, images in batches_by_size(table, BATCH_ROWS):
            encoded = encode(self.model, images.to(self.device), self.image_size).cpu().numpy()
            latents.update(zip(rows, encoded, strict=True))
        kept = sorted(latents)
        return pa.table(
            {
                "shard": pa.array([unit.uri] * len(kept), pa.string()),
                "row": pa.array([unit.first + row for row in kept], pa.int64()),
                LABEL: table[LABEL].take(pa.array(kept, pa.int64())).cast(pa.int64()),
                "latent": pa.array([latents[row] for row in kept], pa.list_(pa.float32())),
            }
        )


def compute_latents(
    locations: Sequence[str],
    classifier: Path,
    kind: str,
    *,
    cache: Path,
    device: Device,
    settings: RaySettings,
) -> Latents:
    """Encode labelled shards; a result for the same shards and network is read from `cache` instead.

    Args:
        locations: labelled Parquet files or folders of them.
        classifier: artifact directory.
        kind: `baseline` or `robust`.
        cache: folder for the Parquet file of latents.
        device: where to encode.
        settings: how much of Ray to take; a session must be open.

    Raises:
        CorpusError: a shard without labels.
    """
    units = [unit for location in locations for unit in _labelled_units(location)]
    inputs = [[unit.uri, unit.first, unit.last, unit.content] for unit in units]
    digest = json_digest([artifact_digest(classifier), inputs])
    path = cache / f"latents.{digest[:12]}.parquet"
    if not path.exists():
        table = _encode(units, classifier, kind, device, settings).sort_by(
            [("shard", "ascending"), ("row", "ascending")]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(".tmp")
        pq.write_table(table, staging)
        staging.replace(path)
    table = pq.read_table(path)
    if table[LABEL].null_count:
        raise CorpusError(f"{', '.join(locations)} has rows without a label")
    flat = table["latent"].combine_chunks().flatten().to_numpy()
    return Latents(
        flat.reshape(table.num_rows, -1),
        table[LABEL].to_numpy(),
        tuple(table["shard"].to_pylist()),
        table["row"].to_numpy(),
    )


def labelled_data_digest(locations: Sequence[str]) -> str:
    """Return a digest of the shards' bytes, whatever they are called and wherever they lie."""
    units = [unit for location in locations for unit in _labelled_units(location)]
    return json_digest(sorted({unit.content for unit in units}))


def _labelled_units(location: str) -> list[Unit]:
    return plan_units(location, image_column=IMAGE, unit_rows=UNIT_ROWS, unit_megabytes=32.0, limit=None)


def _encode(
    units: list[Unit], classifier: Path, kind: str, device: Device, settings: RaySettings
) -> pa.Table:
    shares = share_resources(device, settings, len(units))
    read = map_in_tasks(unit_blocks(units), ReadUnits(), shares)
    encoded = map_in_actors(
        map_in_tasks(read, DecodeImages(IMAGE, DecodeLimits()), shares),
        EncodeLatents,
        {
            "classifier": str(classifier.resolve()),
            "kind": kind,
            "device": shares.device,
            "threads": settings.threads_per_actor,
        },
        actors=shares.purify_actors,
        cpus=shares.purify_cpus,
        gpus=shares.purify_gpus,
    )
    parts = list(encoded.iter_batches(batch_size=None, batch_format="pyarrow"))
    return pa.concat_tables(parts)
