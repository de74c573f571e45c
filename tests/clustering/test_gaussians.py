"""Gaussians of clusters against scipy, scikit-learn and numpy."""

import numpy as np
import pytest
import torch
from scipy.spatial import distance
from sklearn.covariance import LedoitWolf, ledoit_wolf

from acsr_ray.clustering.gaussians import (
    Gaussians,
    fit_gaussians,
    locate_clusters,
    own_squared_mahalanobis,
    squared_mahalanobis,
)


def _clusters(length=6, per_cluster=80, seed=0, rank=None):
    """Return latents of three correlated clusters, two of class 0 and one of class 3, in mixed order."""
    rng = np.random.default_rng(seed)
    class_id = np.repeat([0, 0, 3], per_cluster)
    cluster_id = np.repeat([0, 1, 0], per_cluster)
    mixing = rng.standard_normal((3, length, rank or length))
    which = np.repeat(np.arange(3), per_cluster)
    noise = rng.standard_normal((len(which), rank or length))
    latents = np.einsum("nij,nj->ni", mixing[which], noise) + 4 * rng.standard_normal((3, length))[which]
    order = rng.permutation(len(which))
    return latents[order], class_id[order], cluster_id[order]


def _members(data, k):
    latents, class_id, cluster_id = data
    key = [(0, 0), (0, 1), (3, 0)][k]
    return latents[(class_id == key[0]) & (cluster_id == key[1])]


def _queries(length=6, seed=1):
    return 3 * np.random.default_rng(seed).standard_normal((20, length))


def test_ids_counts_and_means():
    data = _clusters()
    gaussians = fit_gaussians(*data)
    assert gaussians.class_id.tolist() == [0, 0, 3]
    assert gaussians.cluster_id.tolist() == [0, 1, 0]
    assert gaussians.count.tolist() == [80, 80, 80]
    for k in range(3):
        np.testing.assert_allclose(gaussians.mean[k].numpy(), _members(data, k).mean(0), atol=1e-12)


@pytest.mark.parametrize("per_cluster", [80, 5])
def test_shrinkage_distance_equals_scipy_with_ledoit_wolf(per_cluster):
    data = _clusters(per_cluster=per_cluster)
    gaussians, queries = fit_gaussians(*data), _queries()
    got = squared_mahalanobis(torch.from_numpy(queries), gaussians).numpy()
    for k in range(3):
        members = _members(data, k)
        precision = np.linalg.inv(LedoitWolf().fit(members).covariance_)
        expected = [distance.mahalanobis(query, members.mean(0), precision) ** 2 for query in queries]
        np.testing.assert_allclose(got[:, k], expected, rtol=1e-6)


@pytest.mark.parametrize("rank", [None, 4, 2])
def test_pinv_distance_equals_scipy_with_numpy_pinv(rank):
    data = _clusters(rank=rank)
    gaussians, queries = fit_gaussians(*data, inverse="pinv"), _queries()
    got = squared_mahalanobis(torch.from_numpy(queries), gaussians).numpy()
    for k in range(3):
        members = _members(data, k)
        precision = np.linalg.pinv(np.cov(members.T, bias=True), rcond=1e-10, hermitian=True)
        expected = [distance.mahalanobis(query, members.mean(0), precision) ** 2 for query in queries]
        np.testing.assert_allclose(got[:, k], expected, rtol=1e-7)


def test_pinv_ignores_the_null_space_and_shrinkage_does_not():
    data = _clusters(rank=3)
    members = _members(data, 0)
    null = np.linalg.svd(members - members.mean(0))[2][-1]
    moved = torch.from_numpy(members.mean(0) + 100 * null)[None]
    assert squared_mahalanobis(moved, fit_gaussians(*data, inverse="pinv"))[0, 0] < 1e-8
    assert squared_mahalanobis(moved, fit_gaussians(*data))[0, 0] > 1


@pytest.mark.parametrize("inverse", ["shrinkage", "pinv"])
def test_identity_covariance_is_euclidean(inverse):
    length = 7
    latents = np.sqrt(length) * np.concatenate((np.eye(length), -np.eye(length))) + 3
    ids = np.zeros(2 * length, int)
    queries = _queries(length)
    gaussians = fit_gaussians(latents, ids, ids, inverse=inverse)
    got = squared_mahalanobis(torch.from_numpy(queries), gaussians)[:, 0]
    np.testing.assert_allclose(got.numpy(), np.square(queries - 3).sum(1), rtol=1e-7)
    assert gaussians.log_det.item() == pytest.approx(0, abs=1e-6)


def test_full_rank_pinv_is_invariant_to_affine_maps():
    latents, class_id, cluster_id = _clusters()
    queries = _queries()
    rng = np.random.default_rng(2)
    matrix, offset = rng.standard_normal((6, 6)), rng.standard_normal(6)
    before = fit_gaussians(latents, class_id, cluster_id, inverse="pinv")
    after = fit_gaussians(latents @ matrix.T + offset, class_id, cluster_id, inverse="pinv")
    expected = squared_mahalanobis(torch.from_numpy(queries), before)
    got = squared_mahalanobis(torch.from_numpy(queries @ matrix.T + offset), after)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    change = 2 * np.linalg.slogdet(matrix)[1]
    np.testing.assert_allclose((after.log_det - before.log_det).numpy(), change, rtol=1e-8)


def test_mean_squared_distance_of_the_members_is_the_rank():
    for rank in (6, 4):
        data = _clusters(rank=rank)
        gaussians = fit_gaussians(*data, inverse="pinv")
        for k in range(3):
            own = squared_mahalanobis(torch.from_numpy(_members(data, k)), gaussians)[:, k]
            assert own.mean().item() == pytest.approx(rank)


def test_log_det():
    data, flat = _clusters(), _clusters(rank=4)
    shrunk, full = fit_gaussians(*data), fit_gaussians(*data, inverse="pinv")
    deficient = fit_gaussians(*flat, inverse="pinv")
    for k in range(3):
        covariance = np.cov(_members(data, k).T, bias=True)
        assert full.log_det[k].item() == pytest.approx(np.linalg.slogdet(covariance)[1])
        smooth, _ = ledoit_wolf(_members(data, k))
        assert shrunk.log_det[k].item() == pytest.approx(np.linalg.slogdet(smooth)[1], abs=1e-6)
        values = np.linalg.eigvalsh(np.cov(_members(flat, k).T, bias=True))
        assert deficient.log_det[k].item() == pytest.approx(np.log(values[-4:]).sum())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("inverse", ["shrinkage", "pinv"])
@pytest.mark.parametrize("rank", [None, 3])
def test_whitening_is_lower_triangular(inverse, rank, tied):
    whitening = fit_gaussians(*_clusters(rank=rank), inverse=inverse, tied=tied).whitening
    assert torch.equal(whitening, whitening.tril())
    assert whitening.abs().max() > 0


def test_tied_clusters_share_the_pooled_covariance():
    latents, class_id, cluster_id = _clusters()
    gaussians = fit_gaussians(latents, class_id, cluster_id, tied=True)
    residuals = np.concatenate(
        [_members((latents, class_id, cluster_id), k) - gaussians.mean[k].numpy() for k in range(3)]
    )
    pooled, _ = ledoit_wolf(residuals, assume_centered=True)
    for whitening in gaussians.whitening:
        precision = (whitening.T @ whitening).numpy()
        np.testing.assert_allclose(precision, np.linalg.inv(pooled), rtol=1e-6, atol=1e-9)
    assert len(gaussians.log_det.unique()) == 1


def test_a_lone_latent_keeps_finite_shrinkage_distances():
    latents = np.array([[1.0, 2.0], [5.0, 5.0], [6.0, 4.0], [5.5, 6.0]])
    gaussians = fit_gaussians(latents, np.zeros(4, int), np.array([0, 1, 1, 1]))
    squared = squared_mahalanobis(torch.from_numpy(latents), gaussians)
    assert torch.isfinite(squared).all()
    assert squared[0, 0] == 0
    assert squared.argmin(1).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_pack_and_unpack(tied):
    gaussians = fit_gaussians(*_clusters(), tied=tied)
    packed = gaussians.pack()
    assert packed["whitening"].shape == (3, 6 * 7 // 2)
    restored = Gaussians.unpack(packed)
    expected = gaussians.to("cpu", torch.float32)
    for name in ("class_id", "cluster_id", "count", "mean", "whitening", "log_det"):
        assert torch.equal(getattr(restored, name), getattr(expected, name)), name
    queries = torch.from_numpy(_queries())
    torch.testing.assert_close(
        squared_mahalanobis(queries.float(), restored).double(),
        squared_mahalanobis(queries, gaussians),
        rtol=1e-3,
        atol=1e-3,
    )


def test_own_distance_is_a_column_of_all_distances():
    gaussians, queries = fit_gaussians(*_clusters()), torch.from_numpy(_queries())
    index = torch.arange(len(queries)) % 3
    own = own_squared_mahalanobis(queries, gaussians, index)
    torch.testing.assert_close(own, squared_mahalanobis(queries, gaussians)[range(len(queries)), index])


def test_own_distance_has_the_right_gradient():
    gaussians, queries = fit_gaussians(*_clusters()), torch.from_numpy(_queries()[:4]).requires_grad_()
    index = torch.tensor([2, 0, 1, 2])
    (slope,) = torch.autograd.grad(own_squared_mahalanobis(queries, gaussians, index).sum(), queries)
    whitening = gaussians.whitening[index]
    expected = 2 * torch.einsum("nji,njk,nk->ni", whitening, whitening, queries - gaussians.mean[index])
    torch.testing.assert_close(slope, expected.detach())


def test_clusters_are_located_by_class_and_id():
    gaussians = fit_gaussians(*_clusters())
    assert locate_clusters(gaussians, [3, 0, 0, 3], [0, 1, 0, 0]).tolist() == [2, 1, 0, 2]
    with pytest.raises(KeyError):
        locate_clusters(gaussians, [3], [1])


@pytest.mark.parametrize("shorter", [0, 1, 2])
def test_lengths_that_differ_are_refused(shorter):
    data = list(_clusters())
    data[shorter] = data[shorter][:-1]
    with pytest.raises(ValueError, match="one row per image"):
        fit_gaussians(*data)


def test_latents_that_are_not_finite_are_refused():
    latents, class_id, cluster_id = _clusters()
    latents[5, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        fit_gaussians(latents, class_id, cluster_id)


def test_own_distance_keeps_its_precision_within_autocast():
    gaussians = fit_gaussians(*_clusters()).to("cpu", torch.float32)
    queries = torch.from_numpy(_queries()).float()
    index = torch.arange(len(queries)) % len(gaussians.mean)
    with torch.autocast("cpu", torch.bfloat16):
        within = own_squared_mahalanobis(queries, gaussians, index)
        half = own_squared_mahalanobis(queries.bfloat16(), gaussians, index)
    outside = own_squared_mahalanobis(queries, gaussians, index)
    assert within.dtype == half.dtype == torch.float32
    assert torch.equal(within, outside)
    torch.testing.assert_close(half, own_squared_mahalanobis(queries.bfloat16().float(), gaussians, index))
