"""Rows 2, 3 and 5: a node dies, a node is given notice, the head dies."""

import signal
import time

import pytest

from acsr_ray.corpus.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SLOW = {"slow": {"PurifyImages": 0.15}}


def published(output):
    return Ledger(str(output)).published()


def start(start_purify, nodes, corpus, output, **faults):
    return start_purify(
        corpus, output, address=nodes.cluster.address, faults={**SLOW, **faults}, ray={"actors": 2}
    )


@pytest.mark.parametrize("position", [0, 1])
def test_a_killed_node_costs_what_was_in_flight_there(
    start_nodes, start_purify, corpus, oracle, tmp_path, position
):
    """Row 2."""
    nodes, output = start_nodes(), tmp_path / "out"
    job = start(start_purify, nodes, corpus, output)
    job.until(lambda: len(published(output)) >= 5)
    nodes.kill(position)
    assert job.wait(300) == 0, job.told()
    oracle.check(output)


def test_a_node_with_notice_begins_nothing_new(start_nodes, start_purify, corpus, oracle, tmp_path):
    """Row 3: drained, then killed; the other node does the rest."""
    nodes, output = start_nodes(), tmp_path / "out"
    log = tmp_path / "begun"
    job = start(start_purify, nodes, corpus, output, begun=str(log))
    doomed = nodes.nodes[0].node_id

    def begun():
        lines = log.read_text().splitlines() if log.exists() else []
        return [(node, float(when)) for node, when in (line.split() for line in lines)]

    job.until(lambda: len(published(output)) >= 5 and any(node == doomed for node, _ in begun()))
    nodes.drain(0, 12)
    told = time.time()
    job.until(lambda: "nodes are leaving" in job.told(), 30)
    heard = time.time()
    assert heard - told < 10
    time.sleep(max(0.0, told + 12 - time.time()))
    nodes.kill(0)
    assert job.wait(300) == 0, job.told()
    # One tick of the driver may lie between its log and the overseer's knowledge.
    assert not [when for node, when in begun() if node == doomed and when > heard + 1]
    assert [when for node, when in begun() if node != doomed and when > heard + 1]
    oracle.check(output)


def test_the_death_of_the_head_is_followed_by_another_cluster(
    start_nodes, start_purify, corpus, oracle, tmp_path
):
    """Row 5."""
    nodes, output = start_nodes(), tmp_path / "out"
    job = start(start_purify, nodes, corpus, output)
    job.until(lambda: len(published(output)) >= 5)
    done = published(output)
    for process in nodes.cluster.head_node.all_processes.values():
        for info in process:
            info.process.kill()
    began = time.monotonic()
    while job.process.poll() is None and time.monotonic() - began < 150:
        time.sleep(0.5)
    # Ray ends a driver whose head is gone; one that it leaves hanging is stopped by its scheduler.
    if job.process.poll() is None:
        job.process.send_signal(signal.SIGKILL)
    assert job.process.wait() != 0
    nodes.cluster.shutdown()
    again = start(start_purify, start_nodes(), corpus, output)
    assert again.wait(300) == 0, again.told()
    assert done <= published(output)
    oracle.check(output)
