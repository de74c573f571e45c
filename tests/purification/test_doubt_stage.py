"""The stage that purifies and doubts: rows, nulls, the same column for any batch, and what it refuses."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from acsr_ray.artifacts import ArtifactError, artifact_digest
from acsr_ray.columns import DOUBT, ORIGINAL, OUTCOME, STATUS, UNIT
from acsr_ray.config import ConfigError
from acsr_ray.corpus.images import DecodeLimits, decode_image, to_unit_range
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.units import plan_units
from acsr_ray.models.targets import load_target
from acsr_ray.purification.doubt import image_features, load_doubt
from acsr_ray.purification.doubt_stage import PurifyWithDoubt, doubt_settings
from acsr_ray.purification.judge import load_judge
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.stages import (
    DecodeImages,
    EncodeImages,
    PurifyImages,
    ReadUnits,
    SelectClusters,
    WriteUnits,
)
from acsr_ray.sparse.noise import noise_level

OPTIONS = PurifyOptions()
LIMITS = DecodeLimits(max_side=64)
DAMAGED = (3, 8)


@pytest.fixture(scope="module")
def selected(tmp_path_factory, tiny_bundle, hf_table, smooth_pixels, encoded, write_parquet):
    """A table of 45 rows of two sizes as it reaches the stage; two cannot be read."""
    cells = [encoded(image) for image in smooth_pixels(40, 16, 16, seed=9)]
    cells[5:5] = [encoded(image) for image in smooth_pixels(5, 9, 21, seed=10)]
    for row in DAMAGED:
        cells[row] = b"damaged"
    path = write_parquet(tmp_path_factory.mktemp("corpus") / "a.parquet", hf_table(cells))
    (unit,) = plan_units(str(path), image_column="image", unit_rows=99, unit_megabytes=32, limit=None)
    table = DecodeImages("image", LIMITS)(ReadUnits()(pa.table({UNIT: [unit.to_json()]})))
    bundle = str(tiny_bundle)
    encode = EncodeImages(bundle, "cpu", 64, threads=1, options=OPTIONS)
    return SelectClusters(bundle, threads=1, options=OPTIONS)(encode(table))


@pytest.fixture(scope="module")
def doubt_dir(tmp_path_factory, tiny_bundle, tiny_target, make_doubt):
    """A doubt model for the tiny bundle and target."""
    digest = load_target(str(tiny_target)).digest
    return make_doubt(tmp_path_factory.mktemp("doubt") / "doubt", tiny_bundle, digest, image_size=20)


def purify_options(bundle, batch_size=64):
    return {
        "bundle": str(bundle),
        "device": "cpu",
        "batch_size": batch_size,
        "threads": 1,
        "options": OPTIONS,
    }


@pytest.fixture(scope="module")
def doubted(selected, tiny_bundle, doubt_dir, tiny_target):
    return PurifyWithDoubt(purify_options(tiny_bundle), str(doubt_dir), str(tiny_target))(selected)


def test_the_column_is_added_to_what_purification_gives(selected, doubted, tiny_bundle):
    purified = PurifyImages(**purify_options(tiny_bundle))(selected)
    assert doubted.drop_columns([DOUBT]).equals(purified)
    assert doubted.schema.field(DOUBT).type == pa.float32()
    missing = [row for row, value in enumerate(doubted[DOUBT].to_pylist()) if value is None]
    assert missing == list(DAMAGED)


def test_doubt_is_about_the_image_before_and_the_stored_one_after(
    selected, doubted, tiny_bundle, doubt_dir, tiny_target, tmp_path
):
    """From the files of the output alone, image by image."""
    WriteUnits(str(tmp_path / "out"), "f" * 64, "image", True)(doubted)
    ledger = Ledger(str(tmp_path / "out"))
    (name,) = ledger.published()
    written = pq.read_table(tmp_path / "out" / "data" / name)
    assert written.column_names[-len(OUTCOME.names) - 2 :] == [*OUTCOME.names, DOUBT, ORIGINAL]
    purifier, model = Purifier.load(tiny_bundle), load_doubt(doubt_dir)
    judge = load_judge(purifier, str(tiny_target), model.image_size)
    values = []
    for row in written.to_pylist():
        if row[STATUS] != "purified":
            assert row[DOUBT] is None
            continue
        before, after = (
            torch.from_numpy(to_unit_range(decode_image(row[name]["bytes"], LIMITS)))[None]
            for name in (ORIGINAL, "image")
        )
        features = image_features(
            judge.compare(before, after),
            noise_level(before),
            [row["acsr_distance"]],
            [row["acsr_residual"]],
            purifier.gaussians.mean.shape[1],
        )
        assert row[DOUBT] == model.doubt(features)[0]
        values.append(row[DOUBT])
    assert len(set(values)) > 30
    assert 0 <= min(values) < max(values) <= 1


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_change_a_bit(selected, doubted, tiny_bundle, doubt_dir, tiny_target, batch_size):
    stage = PurifyWithDoubt(purify_options(tiny_bundle, batch_size), str(doubt_dir), str(tiny_target))
    assert stage(selected)[DOUBT].equals(doubted[DOUBT])


@pytest.mark.parametrize("rows", [1, 10])
def test_blocks_do_not_change_a_bit(selected, doubted, tiny_bundle, doubt_dir, tiny_target, rows):
    stage = PurifyWithDoubt(purify_options(tiny_bundle), str(doubt_dir), str(tiny_target))
    parts = [stage(selected.slice(first, rows)) for first in range(0, 20, rows)]
    assert pa.concat_tables(parts)[DOUBT].to_pylist() == doubted[DOUBT].to_pylist()[:20]


def test_a_unit_with_no_usable_image(selected, tiny_bundle, doubt_dir, tiny_target):
    stage = PurifyWithDoubt(purify_options(tiny_bundle), str(doubt_dir), str(tiny_target))
    table = stage(selected.take([*DAMAGED]))
    assert table[DOUBT].to_pylist() == [None, None]
    assert table.schema.field(DOUBT).type == pa.float32()


def test_a_classifier_without_finite_answers_leaves_all_to_people(
    tmp_path, selected, tiny_bundle, make_doubt
):
    doubt = make_doubt(tmp_path / "doubt", tiny_bundle)
    stage = PurifyWithDoubt(purify_options(tiny_bundle), str(doubt), None)
    stage.judge.model.fc.weight *= np.nan
    values = stage(selected)[DOUBT].to_pylist()
    assert {value for row, value in enumerate(values) if row not in DAMAGED} == {1.0}


def test_settings_of_a_run(tiny_bundle, doubt_dir, tiny_target):
    assert doubt_settings(None, None, str(tiny_bundle), OPTIONS) == {}
    assert doubt_settings(str(doubt_dir), str(tiny_target), str(tiny_bundle), OPTIONS) == {
        "doubt_digest": artifact_digest(doubt_dir),
        "doubt_classifier": load_target(str(tiny_target)).digest,
    }
    with pytest.raises(ConfigError, match="--target is the classifier of --doubt"):
        doubt_settings(None, str(tiny_target), str(tiny_bundle), OPTIONS)


def test_what_it_was_not_calibrated_for_is_refused(tmp_path, tiny_bundle, doubt_dir, tiny_target, make_doubt):
    bundle, target = str(tiny_bundle), str(tiny_target)
    with pytest.raises(ArtifactError, match="give --target"):
        doubt_settings(str(doubt_dir), None, bundle, OPTIONS)
    own = make_doubt(tmp_path / "own", tiny_bundle)
    doubt_settings(str(own), None, bundle, OPTIONS)
    with pytest.raises(ArtifactError, match="leave --target away"):
        doubt_settings(str(own), target, bundle, OPTIONS)
    other = make_doubt(tmp_path / "other", tiny_bundle, bundle="e" * 64)
    with pytest.raises(ArtifactError, match="for bundle eeeeeeeeeeee"):
        PurifyWithDoubt(purify_options(tiny_bundle), str(other), None)
    with pytest.raises(ArtifactError, match=r"strength 1\.0, not 2\.0$"):
        doubt_settings(str(own), None, bundle, PurifyOptions(strength=2.0))
    with pytest.raises(ArtifactError, match="no doubt at"):
        doubt_settings(str(tmp_path / "nothing"), None, bundle, OPTIONS)
