"""The pipeline's benchmark and its memory over long runs (`-m slow`)."""

import os

import pytest

from acsr_ray.artifacts import artifact_digest
from acsr_ray.benchmark.stream import (
    benchmark_pipeline,
    purifier_side,
    watched_memory,
    write_corpus,
)
from acsr_ray.columns import IMAGE
from acsr_ray.corpus.units import plan_units
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.runtime import RaySettings, ray_session
from acsr_ray.purification.bundle import load_bundle, save_bundle

SLACK = 0.15
"""Growth in memory that counts as none, as a share."""


def test_a_corpus_of_crops(tmp_path):
    source = write_corpus(tmp_path / "in", 30, 24)
    units = plan_units(str(source), image_column=IMAGE, unit_rows=12, unit_megabytes=32, limit=None)
    assert sum(unit.num_rows for unit in units) == 30


def test_the_bare_purifier_takes_time(tiny_bundle):
    assert purifier_side(str(tiny_bundle), 16, 70, "cbpdn")() > 0


@pytest.mark.ray
@pytest.mark.slow
def test_the_pipeline_beside_the_bare_purifier(tiny_bundle):
    row = benchmark_pipeline(str(tiny_bundle), 16, count=40, reconstruction="cbpdn", repeats=1)
    assert (row.part, row.images, row.side) == ("pipeline", 40, 16)
    assert row.seconds > 0
    assert row.peer_seconds > 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat(make_bundle, tmp_path):
    """Thirty times the images, a solver of two rounds: no process and no store may grow with the corpus."""
    long = int(os.environ.get("ACSR_MEMORY_IMAGES", "300000"))
    plain = load_bundle(make_bundle(tmp_path / "plain"))
    quick = plain.config.cbpdn.model_copy(update={"rounds": 2, "iterations": 2})
    bundle = type(plain)(
        plain.config.model_copy(update={"cbpdn": quick}), plain.encoder, plain.gaussians, plain.atoms
    )
    save_bundle(tmp_path / "quick", bundle, {})
    assert artifact_digest(tmp_path / "quick") != artifact_digest(tmp_path / "plain")
    largest = {}
    for count in (long // 30, long):
        source = write_corpus(tmp_path / f"in-{count}", count, 32)
        settings = PurifyCorpusSettings(
            input=str(source), output=str(tmp_path / f"out-{count}"), bundle=str(tmp_path / "quick")
        )
        with ray_session(RaySettings()), watched_memory() as memory:
            assert purify_corpus(settings)["images"] == count
        largest[count] = dict(memory)
    print(largest)
    short, whole = largest.values()
    for what in ("driver", "worker", "object store"):
        assert whole[what] <= (1 + SLACK) * short[what] + 20, what
