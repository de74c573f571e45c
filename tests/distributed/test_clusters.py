"""K-means of classes by tasks: what one process finds, in any order, on the resources asked for."""

import numpy as np
import pytest

from acsr_ray.clustering.elbow import ElbowConfig, cluster_class
from acsr_ray.distributed.clusters import backend_of, cluster_classes

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def latents():
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


def test_tasks_find_what_one_process_finds(latents, ray_local):
    rows, labels = latents
    config = ElbowConfig(k_max=5, restarts=3)
    found = cluster_classes(rows, labels, config, seed=4)
    assert {label: fit.num_clusters for label, fit in found.items()} == {0: 1, 1: 2, 2: 3}
    for label, fit in found.items():
        alone = cluster_class(rows[labels == label], config, seed=4)
        np.testing.assert_array_equal(fit.cluster_id, alone.cluster_id)
        assert (fit.wcss, fit.blob_wcss, fit.elbow) == (alone.wcss, alone.blob_wcss, alone.elbow)


def test_a_bad_class_is_an_error_of_the_job(latents, ray_local):
    rows, labels = latents
    broken = rows.copy()
    broken[3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        cluster_classes(broken, labels, ElbowConfig(k_max=2, restarts=1), seed=0)


def test_auto_takes_the_cpu_library_unless_tasks_have_a_gpu_share():
    assert backend_of(ElbowConfig()) == "sklearn"
    assert backend_of(ElbowConfig(backend="cuml")) == "cuml"
