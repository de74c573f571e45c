"""Where the stages run: every pool takes the GPU share that its settings say, on the nodes that have GPUs."""

import json
from collections import defaultdict

import pyarrow.parquet as pq
import pytest

TRAIN_WORKERS, TRAIN, KMEANS, DICTIONARY, ATTACK = 2, 0.6, 0.25, 0.2, 0.4


def gpus_of(needs):
    """Return the GPUs asked for; in a placement group a resource is called GPU_group_ID."""
    return next((amount for name, amount in needs.items() if name.split("_")[0] == "GPU"), 0.0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_pool_runs_where_and_with_what_its_settings_say(start_nodes, tmp_path):
    nodes = start_nodes(cpus=3, gpus=1, dashboard=True, ACSR_LOGICAL_GPUS="1")
    arguments = (TRAIN_WORKERS, TRAIN, KMEANS, DICTIONARY, ATTACK)
    job = nodes.start("place_everything.py", tmp_path, *arguments)
    try:
        out, err = job.communicate(timeout=540)
    finally:
        job.kill()
    assert job.returncode == 0, err
    result = json.loads(out.splitlines()[-1])

    assert "3 workers" in result["refused"]
    assert result["refused"].count("1 such shares") == 2

    shares, where, needed = result["shares"], defaultdict(list), defaultdict(list)
    for placed in result["placements"]:
        pool = placed["pool"].removeprefix("MapWorker(").replace("MapBatches", "").strip("()")
        where[pool].append(placed["node"])
        needed[pool].append(gpus_of(placed["needs"]))
    for pool in needed:
        print(f"{pool:28} {sorted(needed[pool])} on {sorted(node[:4] for node in where[pool] if node)}")
    print(result["seconds"], result["wall"])

    with_share = {
        "RayTrainWorker": [TRAIN] * TRAIN_WORKERS + [1.0],
        "resolve_backend": [KMEANS],
        "split_class": [KMEANS] * 6,
        "learn_cluster_dictionary": [DICTIONARY] * result["clusters"],
        "held_out_latents": [ATTACK] * 2,
        # Latents of the baseline for the clusters, those of the robust encoder for the bundle.
        "EncodeLatents": [shares["purify_gpus"]] * 4,
        "EncodeImages+SelectClusters": [shares["encode_gpus"]] * 2,
        "PurifyImages": [shares["purify_gpus"]] * 2,
    }
    without = {
        "of_class",
        "choose_clusters",
        "DecodeUnits",
        "ReadUnits+DecodeImages",
        "WriteUnits",
    }
    assert {pool: sorted(needed[pool]) for pool in with_share} == with_share
    assert without <= needed.keys()
    assert not any(sum(needed[pool]) for pool in needed.keys() - with_share.keys())
    assert 0.5 < shares["purify_gpus"] < shares["purify_gpus"] + shares["encode_gpus"] <= 1

    cards = {node for node, gpus in result["gpus"].items() if gpus}
    assert cards == {node.node_id for node in nodes.nodes}
    assert len(result["gpus"]) == 3
    assert all(set(where[pool]) <= cards for pool in with_share.keys() | without)
    # Shares above a half do not fit one card, so these pools had both nodes.
    assert all(set(where[pool]) == cards for pool in ("RayTrainWorker", "EncodeLatents", "PurifyImages"))

    assert json.loads((tmp_path / "bundle/manifest.json").read_text())["bundle"]["name"] == "stripes"
    rows = pq.read_table(tmp_path / "purified/data")
    assert rows["acsr_status"].to_pylist() == ["purified"] * 24
