"""K-means and the merging of small clusters."""

from itertools import pairwise

import numpy as np
import pytest

from acsr_ray.clustering.kmeans import fit_kmeans, merge_small_clusters, resolve_backend


def _planted(num_clusters=4, per_cluster=40, length=5, seed=0):
    rng = np.random.default_rng(seed)
    centres = 8 * np.eye(num_clusters, length)
    cluster_id = np.repeat(np.arange(num_clusters), per_cluster)
    return centres[cluster_id] + rng.standard_normal((len(cluster_id), length)), cluster_id


def _wcss(latents, centroids, cluster_id):
    return np.square(latents - centroids[cluster_id]).sum()


@pytest.mark.parametrize("num_clusters", [1, 3, 7])
def test_wcss_is_the_sum_of_squared_distances_to_the_nearest_centroid(num_clusters):
    latents, _ = _planted()
    result = fit_kmeans(latents, num_clusters, seed=1, backend="sklearn")
    assert result.centroids.shape == (num_clusters, 5)
    assert (result.centroids.dtype, result.cluster_id.dtype) == (np.float32, np.int32)
    assert result.wcss == pytest.approx(_wcss(latents, result.centroids, result.cluster_id), rel=1e-5)
    distances = np.linalg.norm(latents[:, None] - result.centroids, axis=2)
    np.testing.assert_array_equal(result.cluster_id, distances.argmin(1))


def test_centroids_are_the_means_of_their_clusters():
    latents, _ = _planted()
    result = fit_kmeans(latents, 4, seed=1, backend="sklearn")
    for k in range(4):
        np.testing.assert_allclose(result.centroids[k], latents[result.cluster_id == k].mean(0), rtol=1e-5)


def test_wcss_falls_with_the_number_of_clusters():
    latents, _ = _planted()
    wcss = [fit_kmeans(latents, k, seed=0, backend="sklearn").wcss for k in range(1, 9)]
    assert all(later < earlier for earlier, later in pairwise(wcss))
    assert wcss[0] == pytest.approx(np.square(latents - latents.mean(0)).sum())


def test_as_many_clusters_as_latents_leave_nothing():
    latents, _ = _planted(per_cluster=2)
    result = fit_kmeans(latents, len(latents), backend="sklearn")
    assert result.wcss == pytest.approx(0, abs=1e-9)
    assert len(np.unique(result.cluster_id)) == len(latents)


def test_planted_clusters_are_found():
    latents, planted = _planted()
    got = fit_kmeans(latents, 4, seed=2, backend="sklearn").cluster_id
    assert len(set(zip(planted.tolist(), got.tolist(), strict=True))) == 4


def test_more_restarts_are_never_worse():
    latents = np.random.default_rng(3).standard_normal((150, 2))
    one, many = (fit_kmeans(latents, 8, restarts=n, seed=0, backend="sklearn").wcss for n in (1, 20))
    assert many <= one


def test_same_seed_same_clusters():
    latents = np.random.default_rng(4).standard_normal((100, 3))
    first, again = (fit_kmeans(latents, 5, seed=9, restarts=2, backend="sklearn") for _ in range(2))
    np.testing.assert_array_equal(first.cluster_id, again.cluster_id)
    np.testing.assert_array_equal(first.centroids, again.centroids)


def test_given_centroids_are_the_start():
    # Two pairs of columns: a fixed point of Lloyd's algorithm that k-means++ would leave.
    latents = np.array([[0.0, 0], [0, 1], [4, 0], [4, 1]])
    stuck = fit_kmeans(latents, 2, start=np.array([[2.0, 0], [2, 1]]), backend="sklearn")
    np.testing.assert_array_equal(stuck.cluster_id, [0, 1, 0, 1])
    assert stuck.wcss == pytest.approx(16)
    free = fit_kmeans(latents, 2, backend="sklearn")
    assert free.wcss == pytest.approx(1)


def test_order_of_given_centroids_is_kept():
    latents, planted = _planted()
    start = np.stack([latents[planted == k].mean(0) for k in (2, 0, 3, 1)])
    result = fit_kmeans(latents, 4, start=start, backend="sklearn")
    np.testing.assert_array_equal(np.array([2, 0, 3, 1])[result.cluster_id], planted)


@pytest.mark.parametrize("num_clusters", [0, -1, 11])
def test_impossible_numbers_of_clusters_are_refused(num_clusters):
    with pytest.raises(ValueError, match=r"num_clusters must be in 1\.\.10"):
        fit_kmeans(np.zeros((10, 2)), num_clusters, backend="sklearn")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_refused(value):
    latents = np.zeros((10, 2))
    latents[3, 1] = value
    with pytest.raises(ValueError, match="finite"):
        fit_kmeans(latents, 2, backend="sklearn")


def test_backend_is_resolved():
    assert resolve_backend("sklearn") == "sklearn"
    assert resolve_backend("cuml") == "cuml"
    assert resolve_backend("auto") in ("sklearn", "cuml")


def test_small_clusters_join_the_nearest():
    latents = np.array([[0.0], [0.1], [0.2], [1.0], [9.0], [9.1], [9.2], [7.0]])
    cluster_id = np.array([0, 0, 0, 1, 2, 2, 2, 3], np.int32)
    merged = merge_small_clusters(latents, cluster_id, 2)
    np.testing.assert_array_equal(merged, [0, 0, 0, 0, 1, 1, 1, 1])
    assert merged.dtype == np.int32
    np.testing.assert_array_equal(cluster_id, [0, 0, 0, 1, 2, 2, 2, 3])


def test_merging_continues_until_all_are_large_enough():
    rng = np.random.default_rng(5)
    latents, cluster_id = rng.standard_normal((60, 2)), rng.integers(0, 20, 60).astype(np.int32)
    merged = merge_small_clusters(latents, cluster_id, 12)
    ids, sizes = np.unique(merged, return_counts=True)
    assert sizes.min() >= 12
    np.testing.assert_array_equal(ids, np.arange(len(ids)))
    # Clusters only ever join: images that were together stay together.
    assert len(set(zip(cluster_id.tolist(), merged.tolist(), strict=True))) == len(np.unique(cluster_id))


def test_large_enough_clusters_stay():
    latents, planted = _planted()
    np.testing.assert_array_equal(merge_small_clusters(latents, planted.astype(np.int32), 40), planted)


def test_too_large_a_minimum_leaves_one_cluster():
    latents, planted = _planted()
    assert not merge_small_clusters(latents, planted.astype(np.int32), 10_000).any()
