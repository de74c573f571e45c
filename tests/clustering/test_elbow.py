"""The number of clusters: planted clusters, single blobs and the chord rule."""

import numpy as np
import pytest

from acsr_ray.clustering.elbow import ElbowConfig, choose_num_clusters, chord_elbow, cluster_class

CONFIG = ElbowConfig(k_max=7, restarts=3, backend="sklearn")


def _blob(num_images, length, spread, seed):
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, spread, length)
    rotation = np.linalg.qr(rng.standard_normal((length, length)))[0]
    return (rng.standard_normal((num_images, length)) * scales) @ rotation + 5


def _planted(num_clusters, length, seed, per_cluster=150, gap=10):
    rng = np.random.default_rng(seed)
    centres = gap * np.eye(num_clusters, length)
    cluster_id = np.repeat(np.arange(num_clusters), per_cluster)
    return centres[cluster_id] + rng.standard_normal((len(cluster_id), length)), cluster_id


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spread", [1, 0.1, 0.01])
@pytest.mark.parametrize("length", [2, 5, 16, 48])
def test_one_blob_stays_one_cluster(length, spread, seed):
    result = cluster_class(_blob(600, length, spread, seed), CONFIG, seed)
    assert result.num_clusters == result.elbow == 1
    assert not result.cluster_id.any()


@pytest.mark.parametrize("length", [4, 32])
@pytest.mark.parametrize("num_clusters", [2, 3, 4])
def test_planted_clusters_are_found(num_clusters, length):
    latents, planted = _planted(num_clusters, length, seed=num_clusters)
    result = cluster_class(latents, CONFIG, seed=0)
    assert result.num_clusters == result.elbow == num_clusters
    assert result.cluster_id.dtype == np.int32
    pairs = set(zip(planted.tolist(), result.cluster_id.tolist(), strict=True))
    assert len(pairs) == num_clusters
    assert len(result.wcss) == len(result.blob_wcss) == 7


def test_plain_elbow_always_splits():
    plain = CONFIG.model_copy(update={"one_blob_test": False})
    blob = _blob(600, 8, 1, seed=3)
    assert cluster_class(blob, plain, seed=0).num_clusters >= 2
    assert cluster_class(blob, CONFIG, seed=0).num_clusters == 1
    latents, _ = _planted(3, 8, seed=4)
    assert cluster_class(latents, plain, seed=0).num_clusters == 3


def test_small_clusters_are_merged():
    latents, _ = _planted(2, 4, seed=5)
    latents = np.concatenate((latents, latents[:6] + np.array([0, 0, 0, 40])))
    plain = CONFIG.model_copy(update={"one_blob_test": False, "min_cluster_size": 1})
    kept = cluster_class(latents, plain, seed=0)
    merged = cluster_class(latents, CONFIG, seed=0)
    assert kept.elbow == kept.num_clusters == 3
    assert merged.elbow == 3
    assert merged.num_clusters == 2
    assert np.bincount(merged.cluster_id).min() >= 0.05 * len(latents)


@pytest.mark.parametrize("num_images", [1, 2, 3, 5])
def test_tiny_classes(num_images):
    latents = np.random.default_rng(6).standard_normal((num_images, 4))
    result = cluster_class(latents, CONFIG, seed=0)
    assert result.cluster_id.shape == (num_images,)
    assert len(result.wcss) == num_images


def test_identical_latents_are_one_cluster():
    result = cluster_class(np.ones((30, 4)), CONFIG, seed=0)
    assert result.num_clusters == 1
    assert len(result.wcss) == 1


def test_same_seed_same_clusters():
    latents = _blob(300, 4, 0.3, seed=7)
    plain = CONFIG.model_copy(update={"one_blob_test": False, "restarts": 1})
    first, again = (cluster_class(latents, plain, seed=11) for _ in range(2))
    np.testing.assert_array_equal(first.cluster_id, again.cluster_id)
    assert first.wcss == again.wcss
    assert first.blob_wcss == again.blob_wcss


def test_blob_has_the_covariance_of_the_class():
    latents = _blob(2000, 6, 0.1, seed=8)
    result = cluster_class(latents, ElbowConfig(k_max=1, backend="sklearn"), seed=0)
    assert result.blob_wcss[0] == pytest.approx(result.wcss[0], rel=0.1)


def test_no_latents_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        cluster_class(np.zeros((0, 4)), CONFIG, seed=0)


def test_latents_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        cluster_class(np.array([[0.0, 1], [np.nan, 2], [3, 4]]), CONFIG, seed=0)


@pytest.mark.parametrize(
    ("wcss", "expected"),
    [
        # 1 - x - y of the scaled curve: 0, 0.467, 0.489, 0.344, 0.178, 0.
        ([100, 40, 20, 15, 12, 10], 3),
        ([100, 20, 18, 16, 14], 2),
        ([100, 80, 60, 10, 8, 7], 4),
        ([7, 7, 7, 7], 1),
        ([5], 1),
        ([5, 5], 1),
        ([9, 5], 2),
    ],
)
def test_chord_elbow_of_hand_curves(wcss, expected):
    assert chord_elbow(wcss) == expected
    assert chord_elbow([1000 * value for value in wcss]) == expected


def test_split_must_beat_the_blob_by_the_minimum_gain():
    wcss, blob = [100, 40, 30, 25, 22], [100, 50, 40, 33, 28]
    assert chord_elbow(wcss) == 2
    assert choose_num_clusters(wcss, blob, 0.19) == 2
    assert choose_num_clusters(wcss, blob, 0.21) == 1
    assert choose_num_clusters(wcss, wcss, 0.01) == 1
