"""Run every stage on a cluster whose GPUs are only counted, and print what each took, and where it ran.

Ray's state API knows what every task and actor asked for and the node it ran on, also after its end.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.util.state import list_actors, list_tasks

from acsr_ray.clustering.elbow import ElbowConfig
from acsr_ray.corpus.writing import write_shard
from acsr_ray.distributed.bundling import BuildBundleSettings, build_bundle
from acsr_ray.distributed.dictionaries import DictionaryConfig
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.runtime import RaySettings, ResourceError, share_resources
from acsr_ray.distributed.semantics import LearnSemanticsSettings, learn_semantics
from acsr_ray.distributed.training import (
    TrainBaselineSettings,
    TrainRobustSettings,
    train_baseline,
    train_robust,
)
from acsr_ray.sparse import CbpdnConfig, CdlConfig
from acsr_ray.training.loop import OptimizerConfig
from acsr_ray.training.objectives import InnerAttack
from acsr_ray.training.settings import RunSettings

MOST = 9000
SETTLE_S = 4.0
"""Workers and driver send the news of their tasks once a second."""


def stripes(path: Path, count: int, seed: int) -> str:
    """Write two classes that differ in the direction of their stripes."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    y, x = np.mgrid[:16, :16] // 2 % 2
    pixels = np.stack([(y, x)[label] for label in labels])[..., None] * 160
    pixels = (pixels + generator.integers(0, 60, (count, 16, 16, 3))).astype(np.uint8)
    write_shard(path, pixels, labels, [f"{path.stem}-{i}" for i in range(count)], ("rows", "columns"))
    return str(path)


def refusal(train: Callable[[Any], object], settings: object) -> str | None:
    """Return the message of a ResourceError; None when there is none."""
    try:
        train(settings)
    except ResourceError as error:
        return str(error)
    return None


def timed(stage: Callable[[Any], Any], settings: object) -> Any:
    began = time.time()
    result = stage(settings)
    seconds[stage.__name__] = round(time.time() - began, 1)
    return result


def placements() -> list[dict[str, Any]]:
    """Return pool, what was asked for, and node of every task and actor of this job."""
    mine = [("job_id", "=", ray.get_runtime_context().get_job_id())]
    options: dict[str, Any] = {"filters": mine, "detail": True, "limit": MOST}
    found = [(actor.class_name, actor) for actor in list_actors(**options)]
    found += [(task.name, task) for task in list_tasks(**options) if task.type == "NORMAL_TASK"]
    return [
        {"pool": pool, "needs": entry.required_resources or {}, "node": entry.node_id}
        for pool, entry in found
    ]


folder, workers, share = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
kmeans_gpus, dictionary_gpus, attack_gpus = map(float, sys.argv[4:])
logging.basicConfig(level=logging.INFO)
ray.init(log_to_driver=False)
# Small data would be done before the last actor of a pool is there.
ray.data.DataContext.get_current().wait_for_min_actors_s = 120
started = time.time()
seconds: dict[str, float] = {}
train = tuple(stripes(folder / f"train-{k}.parquet", 20, k) for k in range(4))
validation = (stripes(folder / "validation.parquet", 24, 9),)
optimizer = OptimizerConfig(epochs=1, batch_size=16, lanes=2, crop_padding=0)
baseline = TrainBaselineSettings(
    train=train,
    output=folder / "baseline",
    architecture="wrn-10-1-gn",
    image_size=16,
    optimizer=optimizer,
    run=RunSettings(workers=workers, gpus_per_worker=share, cpus_per_worker=1.0, threads=1),
)
too_many = RunSettings(workers=3, cpus_per_worker=0.1)
refused = refusal(train_baseline, baseline.model_copy(update={"run": too_many}))
timed(train_baseline, baseline)
semantics = timed(
    learn_semantics,
    LearnSemanticsSettings(
        train=train,
        baseline=folder / "baseline",
        output=folder / "semantics",
        elbow=ElbowConfig(k_max=3, one_blob_test=False, restarts=2, task_cpus=0.5, task_gpus=kmeans_gpus),
        dictionary=DictionaryConfig(
            images=4,
            cdl=CdlConfig(num_atoms=4, support=5, epochs=1, code=CbpdnConfig(iterations=5)),
            task_gpus=dictionary_gpus,
        ),
        device="cuda",
    ),
)
timed(
    train_robust,
    TrainRobustSettings(
        train=train,
        validation=validation,
        baseline=folder / "baseline",
        semantics=folder / "semantics",
        output=folder / "robust",
        attack=InnerAttack(kind="single_step"),
        optimizer=optimizer,
        device="cuda",
        run=RunSettings(workers=1, cpus_per_worker=1.0, threads=1),
    ),
)
timed(
    build_bundle,
    BuildBundleSettings(
        name="stripes",
        baseline=folder / "baseline",
        semantics=folder / "semantics",
        robust=folder / "robust",
        output=folder / "bundle",
        validation=validation,
        cbpdn=CbpdnConfig(iterations=5),
        task_gpus=attack_gpus,
        device="cuda",
    ),
)
purified = PurifyCorpusSettings(
    input=validation[0], output=str(folder / "purified"), bundle=str(folder / "bundle"), unit_rows=3
)
timed(purify_corpus, purified)
time.sleep(SETTLE_S)
print(
    json.dumps(
        {
            "wall": round(time.time() - started, 1),
            "seconds": seconds,
            "gpus": {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in ray.nodes()},
            "shares": asdict(share_resources(purified.device, RaySettings(), 8)),
            "clusters": semantics["clusters"],
            "refused": refused,
            "placements": placements(),
        }
    )
)
