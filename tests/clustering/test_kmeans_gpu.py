"""The contract of both k-means backends: the same assignments from the same centroids."""

import numpy as np
import pytest

from acsr_ray.clustering.kmeans import fit_kmeans

pytestmark = pytest.mark.gpu


def test_cuml_agrees_with_sklearn():
    pytest.importorskip("cuml")
    generator = np.random.default_rng(0)
    latents = generator.normal(size=(900, 16)) + 6 * generator.normal(size=(3, 16)).repeat(300, 0)
    start = latents[[0, 300, 600]]
    ours, theirs = (fit_kmeans(latents, 3, backend=backend, start=start) for backend in ("sklearn", "cuml"))
    assert np.array_equal(ours.cluster_id, theirs.cluster_id)
    free = [fit_kmeans(latents, 3, backend=backend).wcss for backend in ("sklearn", "cuml")]
    assert free[1] == pytest.approx(free[0], rel=0.01)
