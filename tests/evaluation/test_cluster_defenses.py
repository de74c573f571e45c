"""Choices of the cluster: ACSR is the Purifier; ranks, random and fixed clusters use the bundle's own."""

from typing import NamedTuple

import pytest
import torch

from acsr_ray.clustering.selection import Selection
from acsr_ray.evaluation.cluster_defenses import (
    FixedCluster,
    NearestCluster,
    RandomCluster,
    RankedCluster,
    rank_clusters,
)
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier


@pytest.fixture(scope="module", params=["mahalanobis", "gaussian_loglik"])
def purifier(request, make_bundle, tmp_path_factory):
    return Purifier.load(
        make_bundle(tmp_path_factory.mktemp("bundle") / request.param, selection=request.param)
    )


@pytest.fixture(scope="module")
def images(smooth_pixels):
    return torch.from_numpy(smooth_pixels(12, 16, 16, 7)).permute(0, 3, 1, 2).contiguous() / 255


@pytest.fixture(scope="module")
def every(purifier, images):
    """The images rebuilt by every cluster, (4, 12, 3, 16, 16), and each image's clusters by rank."""
    nothing = torch.zeros(len(images))
    rebuilt = [
        purifier.reconstruct(images, Selection(torch.full((len(images),), k), nothing)).images
        for k in range(4)
    ]
    order, _ = rank_clusters(purifier, images)
    return Every(torch.stack(rebuilt), order)


class Every(NamedTuple):
    images: torch.Tensor
    order: torch.Tensor

    def at_rank(self, rank):
        return self.images[self.order[:, rank - 1], torch.arange(len(self.order))]


def test_acsr_is_the_purifier_and_the_first_rank(purifier, images, every):
    purified = purifier(images)
    assert torch.equal(NearestCluster(purifier)(images), purified)
    assert torch.equal(RankedCluster(purifier, 1)(images), purified)
    assert torch.equal(every.at_rank(1), purified)


def test_ranks_and_clusters_are_entries_of_every_cluster(purifier, images, every):
    assert every.images.shape == (4, 12, 3, 16, 16)
    for k in range(4):
        assert torch.equal(FixedCluster(purifier, k)(images), every.images[k])
        assert torch.equal(RankedCluster(purifier, k + 1)(images), every.at_rank(k + 1))
    assert torch.equal(every.order.sort(1).values, torch.arange(4).expand(12, 4))


def test_order_follows_the_bundles_rule(purifier, images):
    order, distance = rank_clusters(purifier, images)
    selection = purifier.select(purifier.latents(images))
    assert torch.equal(order[:, 0], selection.index)
    assert torch.equal(distance.gather(1, order[:, :1])[:, 0], selection.distance)
    sorted_distance = distance.gather(1, order)
    increasing = (sorted_distance.diff(dim=1) >= 0).all().item()
    assert increasing or purifier.config.selection == "gaussian_loglik"
    assert torch.equal(order[5:6], rank_clusters(purifier, images[5:6])[0])


def test_random_clusters_are_the_bundles_and_all_of_them(purifier, images, every):
    used = set()
    for seed in range(4):
        defended = RandomCluster(purifier).with_seed(seed)(images)
        for n in range(len(images)):
            match = [k for k in range(4) if torch.equal(defended[n], every.images[k, n])]
            assert len(match) == 1
            used.add(match[0])
    assert used == {0, 1, 2, 3}


def test_reselection_codes_the_original_with_the_cluster_of_the_purified_image(purifier, images, every):
    chosen = purifier.select(purifier.latents(purifier(images))).index
    expected = every.images[chosen, torch.arange(len(images))]
    assert torch.equal(NearestCluster(purifier, reselect=1)(images), expected)


@pytest.mark.parametrize(
    ("kind", "value"), [(RankedCluster, 0), (RankedCluster, 5), (FixedCluster, -1), (FixedCluster, 4)]
)
def test_clusters_that_are_not_there(purifier, kind, value):
    with pytest.raises(ValueError, match=f"got {value}"):
        kind(purifier, value)


@pytest.mark.parametrize("sharing", ["global", "thresholds", "filters"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}])
def test_acsr_is_the_purifier_with_a_network_too(sharing, options, make_unrolled_bundle, tmp_path, images):
    bundle = make_unrolled_bundle(tmp_path / "b", sharing)
    purifier = Purifier.load(bundle, options=PurifyOptions(**options))
    assert torch.equal(NearestCluster(purifier)(images), purifier(images))


def test_reselection_with_a_network_follows_the_purified_image(make_unrolled_bundle, tmp_path, images):
    purifier = Purifier.load(make_unrolled_bundle(tmp_path / "b", "filters"))
    chosen = purifier.select(purifier.latents(purifier(images)))
    expected = purifier.reconstruct(images, chosen).images
    assert torch.equal(NearestCluster(purifier, reselect=1)(images), expected)


def test_reselection_changes_nothing_where_all_share_a_network(unrolled_bundle, images):
    purifier = Purifier.load(unrolled_bundle)
    assert torch.equal(NearestCluster(purifier, reselect=2)(images), purifier(images))
