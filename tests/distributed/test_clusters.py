"""K-means of classes by tasks: what one process finds, in any order, on the resources asked for."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.clustering.elbow import ElbowConfig, cluster_class
from acsr_ray.clustering.gaussians import fit_gaussians
from acsr_ray.distributed.clusters import backend_of, cluster_classes
from acsr_ray.distributed.latents import Latents

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def mixed():
    """Three classes of one, two and three well separated blobs, mixed."""
    rng = np.random.default_rng(0)
    parts, labels = [], []
    for label, blobs in enumerate((1, 2, 3)):
        for blob in range(blobs):
            centre = np.zeros(6)
            centre[blob] = 12
            parts.append(centre + rng.standard_normal((80, 6)))
            labels += [label] * 80
    order = rng.permutation(len(labels))
    return np.concatenate(parts)[order].astype(np.float32), np.asarray(labels)[order]


def stored(folder, rows, labels, sizes):
    """Write latents in files of some sizes, as encoders do."""
    files, start = [], 0
    for size in sizes:
        flat = pa.array(rows[start : start + size].reshape(-1))
        files.append(folder / f"{len(files)}.parquet")
        pq.write_table(
            pa.table({"latent": pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])}), files[-1]
        )
        start += size
    assert start == len(rows)
    file = np.repeat(np.arange(len(sizes)), sizes)
    position = np.concatenate([np.arange(size) for size in sizes])
    return Latents(tuple(files), ("a.parquet",) * len(files), file, position, labels, rows.shape[1])


def test_tasks_find_what_one_process_finds(mixed, tmp_path, ray_local):
    rows, labels = mixed
    config = ElbowConfig(k_max=5, restarts=3)
    found = cluster_classes(stored(tmp_path, rows, labels, [100, 0, 300, 80]), config, seed=4)
    assert {label: fit.num_clusters for label, fit in found.items()} == {0: 1, 1: 2, 2: 3}
    for label, fit in found.items():
        alone = cluster_class(rows[labels == label], config, seed=4)
        np.testing.assert_array_equal(fit.cluster_id, alone.cluster_id)
        assert (fit.wcss, fit.blob_wcss, fit.elbow) == (alone.wcss, alone.blob_wcss, alone.elbow)


def test_gaussians_over_files_are_those_over_all_latents(mixed, tmp_path):
    rows, labels = mixed
    cluster_id = (np.arange(len(rows)) % 2).astype(np.int32)
    moments = stored(tmp_path, rows, labels, [7, 400, 73]).gaussian_moments(cluster_id)
    for tied in (False, True):
        found, whole = (
            moments.finish("shrinkage", tied=tied),
            fit_gaussians(rows, labels, cluster_id, tied=tied),
        )
        np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(found.whitening, whole.whitening, rtol=1e-9, atol=1e-12)


def test_a_bad_class_is_an_error_of_the_job(mixed, tmp_path, ray_local):
    rows, labels = mixed
    broken = rows.copy()
    broken[3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        cluster_classes(stored(tmp_path, broken, labels, [480]), ElbowConfig(k_max=2, restarts=1), seed=0)


def test_auto_takes_the_cpu_library_unless_tasks_have_a_gpu_share():
    assert backend_of(ElbowConfig()) == "sklearn"
    assert backend_of(ElbowConfig(backend="cuml")) == "cuml"
