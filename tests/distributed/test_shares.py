"""How a cluster is divided: every worker and actor must have a node that holds it."""

import pytest

from acsr_ray.config import ResumableStop
from acsr_ray.distributed import runtime, trainer
from acsr_ray.distributed.runtime import RaySettings, ResourceError, check_task, share_resources
from acsr_ray.distributed.trainer import place_workers
from acsr_ray.training.settings import RunSettings


@pytest.fixture
def cluster(monkeypatch):
    """Give nodes of so many (CPUs, GPUs) to the functions under test."""

    def set_nodes(*nodes):
        resources = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in nodes]
        total = {name: sum(node[name] for node in resources) for name in ("CPU", "GPU")}
        for module in (runtime, trainer):
            monkeypatch.setattr(module, "node_resources", lambda: resources)
        monkeypatch.setattr(runtime, "cluster_resources", lambda: total)

    return set_nodes


@pytest.mark.parametrize(
    ("nodes", "run", "expected"),
    [
        # A laptop: one CPU trains, the other reads.
        ([(2, 0)], {}, (1, 1.0, 0.0, 0.5, 2)),
        ([(2, 0)], {"workers": 2}, (2, 0.75, 0.0, 0.25, 1)),
        ([(1, 0)], {}, (1, 0.75, 0.0, 0.25, 1)),
        # A worker fits one node, whatever the sum of all; a head without CPUs holds none.
        ([(0, 0), (2, 0), (2, 0)], {}, (1, 1.0, 0.0, 1.0, 2)),
        ([(2, 0), (2, 0)], {"workers": 2}, (2, 1.0, 0.0, 0.5, 2)),
        ([(16, 0)], {}, (1, 12.0, 0.0, 0.25, 16)),
        ([(0, 0), (8, 1), (8, 1)], {}, (2, 6.0, 1.0, 0.25, 8)),
        ([(16, 8)], {}, (8, 1.0, 1.0, 0.5, 2)),
        # Two cards hold one share of 0.6 each.
        ([(8, 1), (8, 1)], {"gpus_per_worker": 0.6}, (2, 6.0, 0.6, 0.25, 8)),
        ([(8, 2)], {"gpus_per_worker": 2.0}, (1, 6.0, 2.0, 0.25, 8)),
        # A part of a card lies on one card.
        ([(8, 4)], {"gpus_per_worker": 0.6}, (4, 1.0, 0.6, 0.5, 2)),
        ([(2, 0), (2, 0)], {"workers": 2, "cpus_per_worker": 1.5}, (2, 1.5, 0.0, 0.25, 2)),
    ],
)
def test_workers_fit_the_nodes(nodes, run, expected, cluster):
    cluster(*nodes)
    placed = place_workers("auto", RunSettings(**run))
    found = (placed.workers, placed.cpus, placed.gpus, placed.decode_cpus, placed.decode_tasks)
    assert found == pytest.approx(expected)
    assert placed.device == ("cuda" if placed.gpus else "cpu")
    # No more threads than the CPUs of a node.
    assert placed.threads <= max(cpus for cpus, _ in nodes)


@pytest.mark.parametrize(
    ("device", "nodes", "run"),
    [
        ("auto", [(8, 1), (8, 1)], {"workers": 3}),
        ("auto", [(8, 1), (8, 1)], {"gpus_per_worker": 2.0, "workers": 1}),
        ("auto", [(8, 1), (8, 1)], {"workers": 3, "gpus_per_worker": 0.6}),
        ("cuda", [(8, 0)], {"workers": 1}),
        ("cpu", [(2, 0), (2, 0)], {"workers": 1, "cpus_per_worker": 3.0}),
        ("cpu", [(2, 0)], {"workers": 2, "cpus_per_worker": 1.0}),
        # NCCL refuses two ranks on one card.
        ("auto", [(8, 1)], {"workers": 2, "gpus_per_worker": 0.5}),
    ],
)
def test_workers_that_would_wait_for_ever_are_refused(device, nodes, run, cluster):
    cluster(*nodes)
    with pytest.raises(ResourceError):
        place_workers(device, RunSettings(**run))


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("actors", [None, 1, 3, 5, 16])
def test_purifiers_fit_the_cards_beside_all_encoders(gpus, actors, cluster):
    cluster((32, gpus))
    shares = share_resources("auto", RaySettings(actors=actors), 100)
    # Ray packs: the encoders may all lie on one card.
    encoders = shares.encode_gpus * shares.encode_actors
    assert encoders <= 0.3 + 1e-9
    room = int((1 - encoders) / shares.purify_gpus + 1e-9) + (gpus - 1) * int(1 / shares.purify_gpus + 1e-9)
    assert room >= shares.purify_actors
    assert min(shares.encode_gpus, shares.purify_gpus) >= 0.001


@pytest.mark.parametrize("nodes", [[(1, 0)], [(2, 0)], [(3, 0)], [(64, 0)], [(2, 1)], [(16, 1)], [(96, 8)]])
@pytest.mark.parametrize("units", [1, 5, 1000])
def test_all_stages_of_a_purification_fit_at_the_same_time(nodes, units, cluster):
    cluster(*nodes)
    shares = share_resources("auto", RaySettings(), units)
    ((cpus, gpus),) = nodes
    if gpus:
        assert (shares.encode_actors, shares.purify_actors) == (min(gpus, units),) * 2
        pools = shares.encode_actors * shares.encode_cpus + shares.purify_actors * shares.purify_cpus
    else:
        assert (shares.encode_actors, shares.purify_actors) == (0, min(cpus, units))
        pools = shares.purify_actors * (shares.encode_cpus + shares.purify_cpus)
    assert 1 <= shares.codec_actors <= units
    assert pools + 2 * shares.codec_actors * shares.codec_cpus <= cpus
    assert min(shares.codec_cpus, shares.purify_cpus) > 0


def test_the_log_says_who_does_what(cluster):
    cluster((2, 0))
    told = str(share_resources("auto", RaySettings(), 9))
    assert told == "on cpu: 1 actors read, 2 encode and purify, 1 write"
    cluster((8, 2))
    assert "2 actors encode, 2 purify, " in str(share_resources("auto", RaySettings(), 9))


@pytest.mark.parametrize(
    ("told", "kind"), [("The current node timed out during startup.", ResumableStop), ("odd", RuntimeError)]
)
def test_a_local_ray_that_is_late_can_be_tried_again(monkeypatch, told, kind):
    def late(*_, **__):
        raise RuntimeError(told)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(runtime.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(runtime.ray, "init", late)
    with pytest.raises(kind), runtime.ray_session(RaySettings()):
        pass


def test_a_task_that_no_node_holds_is_refused(cluster):
    cluster((0, 0), (4, 1), (8, 0))
    check_task("k-means", 8, 0)
    check_task("k-means", 4, 0.5)
    for cpus, gpus in ((9, 0), (8, 0.5), (1, 2)):
        with pytest.raises(ResourceError, match="k-means asks for"):
            check_task("k-means", cpus, gpus)
