"""Which cluster each training image belongs to, fixed in stage i and used by stage ii."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from acsr_ray.artifacts import atomic_write

ASSIGNMENTS = "assignments.parquet"
GAUSSIANS = "gaussians.safetensors"


@dataclass(frozen=True)
class Assignments:
    """Image i is row `rows[i]` of `shards[i]`, of class `class_id[i]` and its cluster `cluster_id[i]`."""

    shards: Sequence[str]
    rows: NDArray[np.int64]
    class_id: NDArray[Any]
    cluster_id: NDArray[np.int32]

    def save(self, path: Path) -> None:
        """Write as Parquet."""
        columns = {
            "shard": pa.array(self.shards, pa.string()).dictionary_encode(),
            "row": pa.array(self.rows, pa.int64()),
            "class_id": pa.array(self.class_id, pa.int32()),
            "cluster_id": pa.array(self.cluster_id, pa.int32()),
        }
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        atomic_write(path, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        table = pq.read_table(path)
        return cls(
            table["shard"].to_pylist(),
            table["row"].to_numpy(),
            table["class_id"].to_numpy(),
            table["cluster_id"].to_numpy(),
        )

    def clusters_of(self, keys: Sequence[tuple[str, int]]) -> NDArray[np.int32]:
        """Return the cluster ids (N,) of images given as (shard, row).

        Raises:
            ValueError: an image that was not clustered.
        """
        known = dict(zip(zip(self.shards, self.rows.tolist(), strict=True), self.cluster_id, strict=True))
        missing = sum(key not in known for key in keys)
        if missing:
            raise ValueError(f"{missing} of {len(keys)} images have no cluster: other shards?")
        return np.array([known[key] for key in keys], np.int32)
