"""Names of clusters: from the run's own bundle, or only the classes, never from another bundle."""

import pytest

from acsr_ray.reporting.naming import ClusterNames, cluster_names
from acsr_ray.reporting.record import RunRecord


def test_the_bundle_of_the_run_gives_all_clusters(purified):
    names = cluster_names(purified.ledger.storage, RunRecord(bundle=str(purified.bundle)))
    assert names.clusters == ((0, 0), (0, 1), (1, 0), (2, 0))
    assert names.class_names == ("ant", "bee", "cat")
    assert names.bundle == "tiny"


@pytest.mark.parametrize("location", ["", "gone", "cifar10-small", "/"])
def test_another_bundle_or_none_gives_only_the_recorded_classes(purified, location):
    names = cluster_names(purified.ledger.storage, RunRecord(bundle=location))
    assert names.clusters == ()
    assert names.class_names == ("ant", "bee", "cat")
    assert names.bundle == "tiny"


def test_clusters_are_found_by_number_and_by_name():
    names = ClusterNames(("ant", "sea/lion", "7"))
    assert names.key("0/3") == (0, 3)
    assert names.key("sea/lion/1") == (1, 1)
    assert names.key("7/0") == (2, 0)
    assert names.key("12/0") == (12, 0)
    for odd in ("", "ant", "ant/", "ant/x", "fly/0", "-1/0", "0/-1", "²/0"):
        assert names.key(odd) is None
    assert names.label((1, 2)) == "sea/lion 2"
    assert names.label((12, 0)) == "class 12 0"
