"""The pipeline on Ray with a GPU (`-m gpu`): the pixels of the CPU's purifier, up to a level."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

from acsr_ray.benchmark.pictures import crops, images
from acsr_ray.benchmark.stream import write_corpus
from acsr_ray.columns import CLASS, CLUSTER, STATUS
from acsr_ray.corpus.images import DecodeLimits, decode_image, to_pixels
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUNDLE, COUNT, SIDE = "cifar10-small", 500, 32
# Of so many the CPU computes the pixels too.
CHECKED = 100


@pytest.fixture(scope="module")
def ray_with_gpu():
    ray.init("local", num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(("way", "actors"), [("unrolled", 1), ("unrolled", 2), ("cbpdn", 1)])
def test_the_job_gives_what_the_cpu_gives(way, actors, tmp_path, ray_with_gpu):
    bundle = load_bundle(BUNDLE)
    source = write_corpus(tmp_path / "in", COUNT, SIDE)
    settings = PurifyCorpusSettings(
        input=str(source),
        output=str(tmp_path / "out"),
        bundle=BUNDLE,
        reconstruction=way,
        device="cuda",
        ray=RaySettings(actors=actors),
    )
    summary = purify_corpus(settings)
    assert summary["images"] == COUNT
    files = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert {row[STATUS] for row in rows} == {"purified"}
    purified = np.stack([decode_image(row["image"]["bytes"], DecodeLimits()) for row in rows])

    cbpdn = bundle.config.cbpdn.model_copy(update={"solver": "admm"})
    config = bundle.config.model_copy(update={"cbpdn": cbpdn})
    named = type(bundle)(config, bundle.encoder, bundle.gaussians, bundle.atoms, bundle.reconstruction)
    with torch.inference_mode():
        oracle = Purifier(named, options=PurifyOptions(reconstruction=way)).purify(
            images(COUNT, SIDE)[:CHECKED]
        )
    expected = to_pixels(oracle.images.numpy())
    chosen = np.array([(row[CLASS], row[CLUSTER]) for row in rows[:CHECKED]])
    same = (chosen == torch.stack([oracle.class_id, oracle.cluster_id], 1).numpy()).all(1)
    assert same.mean() > 0.99
    apart = np.abs(purified[:CHECKED].astype(int) - expected.astype(int))[same]
    print(f"\n{way}: {same.mean():.4f} same cluster, {(apart == 0).mean():.6f} of values equal", end="")
    assert apart.max() <= 1
    assert (apart == 0).mean() > 0.999
    assert (purified != crops(COUNT, SIDE)).any()
