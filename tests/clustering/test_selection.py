"""Selection of the nearest cluster under the three rules."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from acsr_ray.clustering.gaussians import fit_gaussians, squared_mahalanobis
from acsr_ray.clustering.selection import RULES, Selection, select_cluster

LENGTH = 16


def _tight_and_broad(seed, num_images=1500):
    """Return latents of two nearby Gaussians with sigma 1 and sigma 2."""
    rng = np.random.default_rng(seed)
    cluster_id = np.repeat([0, 1], num_images)
    offset = np.zeros(LENGTH)
    offset[0] = 1.5
    noise = rng.standard_normal((2 * num_images, LENGTH))
    return (1 + cluster_id)[:, None] * noise + cluster_id[:, None] * offset, cluster_id


@pytest.fixture(scope="module")
def gaussians():
    latents, cluster_id = _tight_and_broad(0)
    return fit_gaussians(latents, np.zeros_like(cluster_id), cluster_id)


@pytest.fixture(scope="module")
def queries():
    latents, cluster_id = _tight_and_broad(1)
    return torch.from_numpy(latents), torch.from_numpy(cluster_id)


def test_mahalanobis_sends_tight_latents_to_the_broad_cluster(gaussians, queries):
    latents, cluster_id = queries
    index = select_cluster(latents[cluster_id == 0], gaussians, "mahalanobis").index
    assert (index == 1).double().mean() > 0.9


def test_gaussian_loglik_keeps_tight_latents(gaussians, queries):
    latents, cluster_id = queries
    index = select_cluster(latents, gaussians, "gaussian_loglik").index
    for k in (0, 1):
        assert (index[cluster_id == k] == k).double().mean() > 0.9


def test_gaussian_loglik_is_the_most_likely_gaussian(gaussians, queries):
    latents, _ = queries
    densities = []
    for mean, whitening in zip(gaussians.mean, gaussians.whitening, strict=True):
        covariance = np.linalg.inv((whitening.T @ whitening).numpy())
        densities.append(multivariate_normal(mean.numpy(), covariance).logpdf(latents.numpy()))
    index = select_cluster(latents, gaussians, "gaussian_loglik").index
    np.testing.assert_array_equal(index.numpy(), np.argmax(densities, axis=0))


@pytest.mark.parametrize("rule", RULES)
def test_distance_is_the_mahalanobis_distance_to_the_chosen_cluster(gaussians, queries, rule):
    latents, _ = queries
    selection = select_cluster(latents, gaussians, rule)
    squared = squared_mahalanobis(latents, gaussians)
    torch.testing.assert_close(selection.distance.square(), squared[range(len(latents)), selection.index])
    if rule != "gaussian_loglik":
        torch.testing.assert_close(selection.distance, squared.amin(1).sqrt())


def test_tied_compares_distances_under_one_covariance(queries):
    latents, cluster_id = _tight_and_broad(0)
    tied = fit_gaussians(latents, np.zeros_like(cluster_id), cluster_id, tied=True)
    precision = tied.whitening[0].T @ tied.whitening[0]
    # Under one covariance the boundary is the hyperplane half way between the means.
    normal = precision @ (tied.mean[1] - tied.mean[0])
    expected = ((queries[0] - tied.mean.mean(0)) @ normal > 0).long()
    assert torch.equal(select_cluster(queries[0], tied, "tied").index, expected)
    assert 0 < expected.sum() < len(expected)


def test_clusters_of_all_classes_compete():
    rng = np.random.default_rng(2)
    centres = 20 * np.eye(3, 5)
    which = np.repeat([0, 1, 2], 60)
    latents = centres[which] + rng.standard_normal((180, 5))
    gaussians = fit_gaussians(latents, np.array([0, 7, 7])[which], np.array([0, 0, 1])[which])
    for rule in RULES:
        index = select_cluster(torch.from_numpy(latents), gaussians, rule).index
        np.testing.assert_array_equal(index.numpy(), which)


@pytest.fixture(scope="module")
def seven():
    """Seven Gaussians of different widths, and latents among them."""
    rng = np.random.default_rng(3)
    which = np.repeat(np.arange(7), 60)
    spread = (1 + which[:, None] % 3) * rng.standard_normal((420, 5))
    latents = 3 * rng.standard_normal((7, 5))[which] + spread
    return fit_gaussians(latents, np.zeros(420, int), which), torch.from_numpy(latents[::9].copy())


@pytest.mark.parametrize("rule", ["mahalanobis", "gaussian_loglik"])
@pytest.mark.parametrize("top_k", [2, 3, 7])
def test_the_best_clusters_come_in_order(seven, rule, top_k):
    gaussians, latents = seven
    squared = squared_mahalanobis(latents, gaussians)
    score = squared + gaussians.log_det if rule == "gaussian_loglik" else squared
    chosen = select_cluster(latents, gaussians, rule, top_k)
    for row, nearest in enumerate(chosen.candidates.tolist()):
        assert nearest == sorted(range(7), key=lambda k, row=row: score[row, k].item())[:top_k]
    alone = select_cluster(latents, gaussians, rule)
    assert torch.equal(chosen.index, alone.index)
    assert torch.equal(chosen.candidates[:, 0], alone.index)
    assert torch.equal(chosen.distance, alone.distance)


def test_one_cluster_is_its_only_candidate(seven):
    gaussians, latents = seven
    chosen = select_cluster(latents, gaussians, "mahalanobis")
    assert chosen.nearest is None
    assert torch.equal(chosen.candidates, chosen.index[:, None])


@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_of_a_selection(seven, top_k):
    gaussians, latents = seven
    chosen = select_cluster(latents, gaussians, "mahalanobis", top_k)
    part = chosen.rows(slice(2, 5))
    assert isinstance(part, Selection)
    assert torch.equal(part.index, chosen.index[2:5])
    assert torch.equal(part.distance, chosen.distance[2:5])
    assert torch.equal(part.candidates, chosen.candidates[2:5])
