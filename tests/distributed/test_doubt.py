"""From labelled shards to a doubt model, and from there to a column of a purified corpus."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.artifacts import ArtifactError, json_digest
from acsr_ray.columns import DOUBT, OUTCOME, UNIT
from acsr_ray.config import ConfigError
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import plan_units
from acsr_ray.distributed.doubt import CalibrateDoubtSettings, calibrate_doubt
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings, deciding_settings
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.evaluation.doubt_fit import DoubtError
from acsr_ray.purification.bundle import ALGORITHM_VERSION, bundle_digest
from acsr_ray.purification.doubt import load_doubt
from acsr_ray.purification.doubt_stage import PurifyWithDoubt
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.stages import DecodeImages, EncodeImages, ReadUnits, SelectClusters

pytestmark = pytest.mark.ray

IMAGES = 60


def job(source, bundle, target, output, **changes):
    fields = {
        "bundle": str(bundle),
        "target": target and str(target),
        "validation": (str(source),),
        "images": IMAGES,
        "attacks": ("fgsm-linf-4",),
        "prevalence": 0.3,
        "output": output,
        **changes,
    }
    return CalibrateDoubtSettings.model_validate(fields)


@pytest.fixture(scope="module")
def shard(tmp_path_factory, write_shard):
    return write_shard(tmp_path_factory.mktemp("in") / "a.parquet", count=70, side=20, seed=3)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, shard, tiny_bundle, tiny_target, make_doubt, ray_local):
    """The folders of a doubt model for the tiny target and of another one, and the job's summary."""
    output = tmp_path_factory.mktemp("out") / "doubt"
    summary = calibrate_doubt(job(shard, tiny_bundle, tiny_target, output))
    other = make_doubt(output.parent / "other", tiny_bundle, load_doubt(output).classifier, image_size=20)
    return output, other, summary


def test_the_job_leaves_a_model_its_report_and_its_measures(calibrated, tiny_bundle):
    output, _, summary = calibrated
    model = load_doubt(output)
    assert model.bundle == bundle_digest(tiny_bundle)
    assert model.options == PurifyOptions(reconstruction="cbpdn", strength=1.0)
    assert model.image_size == 20
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["images"] == {"fitted": IMAGES // 2, "held_out": IMAGES // 2, "side": 20}
    assert manifest["attacks"]["fgsm-linf-4"]["name"] == "fgsm"
    assert set(manifest["metrics"]["aurc"]) == {"doubt", "confidence", "random"}
    assert summary["held-out images"] == IMAGES // 2
    page = (output / "report.html").read_text()
    assert page.count("<img") == 1
    assert summary["errors left, doubt"]["90%"] in page
    # Two chunks, clean and attacked.
    assert len(list((output / "units").glob("*.parquet"))) == 4


def test_a_second_run_reuses_the_units_and_gives_the_same_model(calibrated, shard, tiny_bundle, tiny_target):
    output, *_ = calibrated
    before = (output / "manifest.json").read_bytes()
    stamps = {path.name: path.stat().st_mtime_ns for path in (output / "units").iterdir()}
    calibrate_doubt(job(shard, tiny_bundle, tiny_target, output))
    assert (output / "manifest.json").read_bytes() == before
    assert {path.name: path.stat().st_mtime_ns for path in (output / "units").iterdir()} == stamps


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attacks": ("fgsm-linf-5",)}, ConfigError, "did you mean 'fgsm-linf-4'"),
        ({"reconstruction": "unrolled"}, ArtifactError, "no unrolled reconstruction"),
        ({"validation": ("/nowhere",)}, CorpusError, "/nowhere does not exist"),
    ],
)
def test_settings_that_cannot_work(tmp_path, shard, tiny_bundle, tiny_target, changes, error, message):
    with pytest.raises(error, match=message):
        calibrate_doubt(job(shard, tiny_bundle, tiny_target, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_labels_without_a_class_are_refused(
    tmp_path, hf_table, smooth_pixels, encoded, write_parquet, tiny_bundle
):
    table = hf_table([encoded(image) for image in smooth_pixels(30, 16, 16, seed=1)])
    labels = np.arange(30) % 5
    path = write_parquet(tmp_path / "a.parquet", table.set_column(2, "label", [labels]))
    with pytest.raises(DoubtError, match="up to 4, but the classifier has 3 classes"):
        calibrate_doubt(job(path, tiny_bundle, None, tmp_path / "out"))


def purify(source, output, bundle, **changes):
    fields = {
        "input": str(source),
        "output": str(output),
        "bundle": str(bundle),
        "unit_rows": 20,
        "limit": 30,
        **changes,
    }
    return PurifyCorpusSettings.model_validate(fields)


def purify_here(source, bundle, doubt, target):
    """Return the rows of a shard as one table, by the stages alone."""
    (unit,) = plan_units(str(source), image_column="image", unit_rows=99, unit_megabytes=32, limit=30)
    table = DecodeImages("image", DecodeLimits())(ReadUnits()(pa.table({UNIT: [unit.to_json()]})))
    how = {"bundle": str(bundle), "threads": 1, "options": PurifyOptions()}
    options = {**how, "device": "cpu", "batch_size": 64}
    table = SelectClusters(**how)(EncodeImages(**options)(table))
    return PurifyWithDoubt(options, str(doubt), str(target))(table)


@pytest.mark.slow
def test_the_column_of_a_run_is_that_of_the_stages(
    tmp_path, calibrated, shard, tiny_bundle, tiny_target, ray_local
):
    run = purify(
        *(shard, tmp_path / "out", tiny_bundle),
        **{"doubt": str(calibrated[0]), "target": str(tiny_target)},
        **{"batch_size": 3, "unit_rows": 7, "ray": RaySettings(actors=1)},
    )
    purify_corpus(run)
    paths = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    table = pa.concat_tables(pq.read_table(path) for path in paths)
    assert len(paths) == 5
    assert table.column_names == [*pq.read_schema(shard).names, *OUTCOME.names, DOUBT]
    assert table["id"].to_pylist() == list(range(1000, 1030))
    expected = purify_here(shard, tiny_bundle, calibrated[0], tiny_target)
    assert table[DOUBT].to_pylist() == expected[DOUBT].to_pylist()
    assert len(set(table[DOUBT].to_pylist())) > 20
    # The same output without the column, or with that of another classifier, is another output.
    for changes in ({"doubt": None, "target": None}, {"doubt": str(calibrated[1])}):
        with pytest.raises(CorpusError, match="doubt_digest"):
            purify_corpus(run.model_copy(update=changes))


def test_the_fingerprint_of_runs_without_doubt_is_what_it_was(calibrated, shard, tiny_bundle, tiny_target):
    plain = purify(shard, "out", tiny_bundle)
    assert json_digest(deciding_settings(plain)) == json_digest(
        {
            "algorithm_version": ALGORITHM_VERSION,
            "bundle_digest": bundle_digest(tiny_bundle),
            "decode": {},
            "image_column": "image",
            "keep_original": False,
        }
    )
    doubted = plain.model_copy(update={"doubt": str(calibrated[0]), "target": str(tiny_target)})
    assert set(deciding_settings(doubted)) - set(deciding_settings(plain)) == {
        "doubt_digest",
        "doubt_classifier",
    }


def test_a_doubt_of_another_classifier_stops_the_job_before_it_writes(
    tmp_path, calibrated, shard, tiny_bundle
):
    with pytest.raises(ArtifactError, match="give --target"):
        purify_corpus(purify(shard, tmp_path / "out", tiny_bundle, doubt=str(calibrated[0])))
    assert not (tmp_path / "out").exists()
