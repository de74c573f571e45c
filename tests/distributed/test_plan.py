"""`plan` on a local Ray: it says what purify would do and refuse, writes its plan alone, and comes true."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from acsr_ray.config import ConfigError
from acsr_ray.corpus.records import PLAN
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed import plan as plan_module
from acsr_ray.distributed import sample_run
from acsr_ray.distributed.plan import ClusterSettings, PlanSettings, plan
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.reporting.planned import compare
from acsr_ray.reporting.record import RunRecord

pytestmark = pytest.mark.ray


def asked(source: Path, bundle: Path, **changes: object) -> PlanSettings:
    fields = {"input": str(source), "bundle": str(bundle), "unit_rows": 20, "sample": 24, **changes}
    return PlanSettings.model_validate(fields)


def purified(settings: PlanSettings) -> dict[str, object]:
    own = {name: getattr(settings, name) for name in PurifyCorpusSettings.model_fields}
    return purify_corpus(PurifyCorpusSettings.model_validate(own))


@pytest.fixture
def one_sample(monkeypatch):
    """Take a short sample once, and the same again where the sample is not what a test is about."""
    monkeypatch.setattr(sample_run, "REPEAT_S", 0.1)
    taken = []

    def run(*arguments, check):
        if not taken:
            taken.append(sample_run.run_sample(*arguments, check=check))
        check(taken[0].machine)
        return taken[0]

    monkeypatch.setattr(plan_module, "run_sample", run)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_plan_is_all_that_is_written_and_an_output_does_not_look_begun(
    tmp_path, write_shard, unrolled_bundle, ray_local, one_sample
):
    source, output = tmp_path / "in", tmp_path / "out"
    write_shard(source / "a.parquet", count=50)
    (source / "b.parquet").write_bytes(b"rubbish")
    before = files(source)
    found = plan(asked(source, unrolled_bundle, output=str(output)))
    assert files(output) == {PLAN}
    assert files(source) == before
    assert json.loads((output / PLAN).read_text()) == found
    assert (found["schema_version"], found["images"], found["images_to_do"], found["shards"]) == (
        1,
        50,
        50,
        2,
    )
    assert (found["units"], found["refused"]) == (3, None)
    assert [problem["code"] for problem in found["problems"]] == ["not_parquet"]
    assert found["sample"]["images"] == 24
    assert found["cluster"] == {"cpus": 2.0, "gpus": 0.0, "nodes": 1}
    estimate = found["estimate"]
    for name in ("seconds", "images_per_s", "cpu_hours", "output_bytes"):
        assert 0 < estimate[name]["low"] < estimate[name]["mean"] < estimate[name]["high"], name
    assert set(estimate["memory_mib"]) == {"driver", "worker", "object_store"}
    text = PlanSettings.render(asked(source, unrolled_bundle), found)
    assert "not_parquet" in text
    assert "50, 50 of them to do" in text
    # The plan alone binds the output to nothing: any settings may begin there.
    settings = asked(source, unrolled_bundle, output=str(output), unit_rows=30)
    assert purified(settings)["images"] == 50
    assert (output / PLAN).exists()

    # A night later: one shard more, one as it was.
    write_shard(source / "c.parquet", count=7, seed=3)
    there = {name: (output / name).read_bytes() for name in files(output) - {PLAN}}
    found = plan(settings)
    assert (found["images"], found["images_to_do"], found["units_to_do"]) == (57, 7, 1)
    assert {name: (output / name).read_bytes() for name in files(output) - {PLAN}} == there
    assert purified(settings)["this run"].startswith("7 images")

    # Other settings: what purify would refuse is said here.
    other = asked(source, unrolled_bundle, output=str(output), unit_rows=10)
    with pytest.raises(CorpusError) as refusal:
        purified(other)
    found = plan(other)
    assert found["refused"] == str(refusal.value)
    assert found["problems"][0]["code"] == "output_refused"
    assert plan(other.model_copy(update={"anew": True}))["refused"] is None

    # Nothing to do needs no sample.
    found = plan(settings)
    assert (found["images_to_do"], found["sample"]["images"]) == (0, 0)
    assert found["estimate"]["seconds"]["mean"] < 5
    assert "nothing to do" in settings.render(found)
    # The output knows its input, its bundle and how its shards are cut.
    alone = plan(PlanSettings(output=str(output)))
    assert (alone["images"], alone["images_to_do"], alone["refused"]) == (57, 0, None)


def test_a_plan_for_another_cluster(tmp_path, write_shard, unrolled_bundle, ray_local, one_sample):
    write_shard(tmp_path / "a.parquet", count=50)
    with pytest.raises(ConfigError, match="gpu-speedup"):
        plan(asked(tmp_path, unrolled_bundle, cluster=ClusterSettings(gpus=4)))
    cluster = ClusterSettings(cpus=64, gpus=4, nodes=2, gpu_speedup=30)
    found = plan(asked(tmp_path, unrolled_bundle, cluster=cluster))
    assert found["cluster"] == {"cpus": 64.0, "gpus": 4.0, "nodes": 2}
    assert found["estimate"]["gpu_hours"]["mean"] == pytest.approx(
        4 * found["estimate"]["seconds"]["mean"] / 3600, rel=0.01
    )
    assert found["sample"]["device"] == "cpu"
    on_cpus = plan(asked(tmp_path, unrolled_bundle, cluster=cluster, device="cpu"))
    assert on_cpus["estimate"]["gpu_hours"]["mean"] == 0


def test_what_cannot_be_planned(tmp_path, unrolled_bundle):
    with pytest.raises(CorpusError, match="--input"):
        plan(PlanSettings())
    with pytest.raises(ConfigError, match="--demo"):
        plan(PlanSettings(demo=True))
    with pytest.raises(CorpusError, match="does not exist"):
        plan(asked(tmp_path / "absent", unrolled_bundle))
    with pytest.raises(CorpusError, match="lies inside"):
        plan(asked(tmp_path, unrolled_bundle, output=str(tmp_path / "out")))


def write_photos(folder: Path, count: int) -> None:
    """Write crops of photos, two thirds of 32 pixels and the others of four sizes, as PNG or JPEG."""
    skimage = pytest.importorskip("skimage.data")
    photos = [*load_sample_images().images, skimage.astronaut(), skimage.coffee(), skimage.chelsea()]
    sizes = [(32, 32)] * 8 + [(48, 48), (64, 64), (64, 48), (96, 64)]
    draws = np.random.default_rng(3)
    folder.mkdir()
    for first in range(0, count, 5000):
        cells = []
        for row in range(first, min(first + 5000, count)):
            height, width = sizes[draws.integers(len(sizes))]
            photo = photos[draws.integers(len(photos))]
            top, left = (draws.integers(n - m) for n, m in zip(photo.shape[:2], (height, width), strict=True))
            kind, options = [("PNG", {}), ("JPEG", {"quality": 92})][int(draws.random() < 0.4)]
            buffer = io.BytesIO()
            crop = photo[top : top + height, left : left + width]
            Image.fromarray(crop).save(buffer, kind, **options)
            cells.append({"bytes": buffer.getvalue(), "path": f"{row}.{kind.lower()}"})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(cells, kind)})
        pq.write_table(table, folder / f"part-{first:06d}.parquet", row_group_size=500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_plan_holds_on_20000_images(tmp_path):
    """Planned beside actual with the default bundle, in this process's own Ray; wants a quiet machine."""
    count = int(os.environ.get("ACSR_PLAN_IMAGES", "20000"))
    write_photos(tmp_path / "in", count)
    load_before = os.getloadavg()[0]
    settings = PlanSettings(input=str(tmp_path / "in"), output=str(tmp_path / "out"), ray=RaySettings())
    found = plan(settings)
    print(f"\n{settings.render(found)}")
    purified(settings)
    (kept,) = (tmp_path / "out" / "_acsr" / "runs").rglob("record.json")
    record = RunRecord.model_validate_json(kept.read_bytes())
    assert record.plan == found
    (seconds,) = (one for one in compare(record) if one.quantity == "seconds")
    print(
        f"planned {seconds.mean:.1f} s ({seconds.low:.1f} to {seconds.high:.1f}), "
        f"actual {seconds.actual:.1f} s, ratio {seconds.ratio:.3f}; "
        f"load {load_before:.1f} before and {os.getloadavg()[0]:.1f} after"
    )
    assert abs(1 / seconds.ratio - 1) <= 0.25
