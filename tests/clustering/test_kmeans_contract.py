"""What both k-means backends promise; `-m gpu` runs the same tests on cuML."""

import numpy as np
import pytest
import torch

from acsr_ray.clustering.kmeans import fit_kmeans

BACKENDS = ["sklearn", pytest.param("cuml", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cuml":
        pytest.importorskip("cuml")
    return request.param


@pytest.fixture(scope="module")
def blobs():
    """Overlapping blobs: their clusters are not obvious, and Lloyd's iterations matter."""
    generator = np.random.default_rng(0)
    centres = 2.5 * generator.normal(size=(5, 12))
    return (centres.repeat(200, 0) + generator.normal(size=(1000, 12))).astype(np.float32)


def lloyd(latents, centroids):
    """Lloyd's algorithm in float64, to its fixed point."""
    latents, centroids = latents.astype(np.float64), centroids.astype(np.float64)
    while True:
        cluster_id = ((latents[:, None] - centroids) ** 2).sum(2).argmin(1)
        moved = np.stack([latents[cluster_id == k].mean(0) for k in range(len(centroids))])
        if np.array_equal(moved, centroids):
            return cluster_id, centroids
        centroids = moved


@pytest.mark.parametrize("rows", [[0, 200, 400, 600, 800], [0, 1, 2, 3, 4]])
def test_identical_starts_give_the_clusters_of_lloyds_algorithm(backend, blobs, rows):
    found = fit_kmeans(blobs, 5, backend=backend, start=blobs[rows])
    cluster_id, centroids = lloyd(blobs, blobs[rows])
    # Implementations stop when the centroids hardly move: a few border points may still be on the way.
    matching = np.array([np.linalg.norm(centroids - centre, axis=1).argmin() for centre in found.centroids])
    assert sorted(matching.tolist()) == [0, 1, 2, 3, 4]
    assert (matching[found.cluster_id] == cluster_id).mean() > 0.99


def test_free_starts_come_within_one_percent_of_the_best_known(backend, blobs):
    best = min(fit_kmeans(blobs, 5, backend="sklearn", seed=seed).wcss for seed in range(5))
    found = fit_kmeans(blobs, 5, backend=backend, seed=99)
    assert found.wcss == pytest.approx(best, rel=0.01)
    centres = found.centroids[found.cluster_id].astype(np.float64)
    assert found.wcss == pytest.approx(((blobs - centres) ** 2).sum(), rel=1e-4)


def test_a_tensor_is_clustered_as_its_array(backend, blobs):
    device = "cuda" if backend == "cuml" else "cpu"
    tensor = torch.from_numpy(blobs).to(device)
    start = blobs[[0, 200, 400, 600, 800]]
    ours, theirs = (fit_kmeans(rows, 5, backend=backend, start=start) for rows in (tensor, blobs))
    np.testing.assert_array_equal(ours.cluster_id, theirs.cluster_id)


def test_a_tensor_must_be_finite(backend, blobs):
    broken = torch.from_numpy(blobs).clone()
    broken[3, 2] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        fit_kmeans(broken, 2, backend=backend)
