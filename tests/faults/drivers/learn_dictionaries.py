"""Learn the dictionaries of many clusters, and write down who worked on what, where and when."""

import json
import logging
import os
import sys
import time
import uuid
from pathlib import Path

import ray

from acsr_ray.distributed.dictionaries import (
    ClusterImages,
    DictionaryConfig,
    learn_cluster_dictionary,
    learn_dictionaries,
)
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.cdl import CdlConfig

shard, count, per_cluster, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
log = folder / "log"
log.mkdir(parents=True, exist_ok=True)


def learn(rows, config, seed, device):
    """Learn for real, between two notes on disk."""
    note = {"first": rows[0][1], "node": ray.get_runtime_context().get_node_id(), "start": time.time()}
    path = log / f"{uuid.uuid4().hex}.json"
    path.write_text(json.dumps(note))
    os.environ["OMP_NUM_THREADS"] = "1"
    result = learn_cluster_dictionary(rows, config, seed, device)
    path.write_text(json.dumps({**note, "end": time.time()}))
    return result


logging.basicConfig(level=logging.WARNING)
clusters = [
    ClusterImages(0, k, tuple((shard, row) for row in range(k * per_cluster, (k + 1) * per_cluster)))
    for k in range(count)
]
config = DictionaryConfig(
    images=per_cluster, cdl=CdlConfig(num_atoms=16, epochs=8, code=CbpdnConfig(iterations=20, rho=4.0))
)
ray.init(log_to_driver=False)
started = time.time()
paths = learn_dictionaries(clusters, config, folder / "dictionaries", seed=0, max_in_flight=4, learn=learn)
print(json.dumps({"wall": time.time() - started, "paths": [path.name for path in paths]}))
