"""The timed sample: work is counted as the stages do it, rows go through the real stages, sums are right."""

from collections import Counter

import pyarrow as pa
import pytest
import torch

from acsr_ray.columns import HEIGHT, PIXELS, STATUS, WIDTH
from acsr_ray.corpus.changes import list_corpus
from acsr_ray.corpus.sampling import draw_sample
from acsr_ray.corpus.survey import OutputState, survey_corpus
from acsr_ray.corpus.units import UnitPlan
from acsr_ray.purification import sizing
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.sizing import Sample, SampleTimer, StageRecipe, Work, merged
from acsr_ray.purification.stages import EncodeImages, PurifyImages, batches_by_size

PLAN = UnitPlan(unit_rows=8)


def decoded(*sizes: tuple[int, int]) -> pa.Table:
    return pa.table(
        {
            PIXELS: pa.array([bytes(3 * h * w) for h, w in sizes], pa.large_binary()),
            HEIGHT: pa.array([h for h, _ in sizes], pa.int32()),
            WIDTH: pa.array([w for _, w in sizes], pa.int32()),
        }
    )


@pytest.mark.parametrize("batch_size", [7, 64])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_work_is_cut_as_the_stages_cut_it(batch_size, device):
    encoder_call = sizing.ENCODER_MICRO_BATCH[device]
    sizes = [(16, 16)] * 40 + [(24, 16)] * 3 + [(130, 130)] * 2
    work = Work(device, batch_size, "unrolled")
    calls, pixels = 0, 0
    for rows, images in batches_by_size(decoded(*sizes), batch_size):
        calls += -(-len(rows) // encoder_call)
        height, width = images.shape[-2:]
        micro = sizing.micro_batch(height, width, device)
        pixels += -(-len(rows) // micro) * micro * height * width
    counted = Counter(sizes)
    assert sum(work.encoder_images(size, n) for size, n in counted.items()) == encoder_call * calls
    assert sum(work.solver_pixels(size, n) for size, n in counted.items()) == pixels


def test_the_encoder_really_sees_so_many_images(tiny_bundle):
    sizes = [(16, 16)] * 40 + [(20, 16)] * 3
    stage = EncodeImages(str(tiny_bundle), "cpu", 64, 1)
    seen = []
    forward = stage.purifier.encoder.latent
    stage.purifier.encoder.latent = lambda images: seen.append(len(images)) or forward(images)
    table = decoded(*sizes).append_column(STATUS, pa.array(["purified"] * len(sizes)))
    stage(table)
    work = Work("cpu", 64, "cbpdn")
    assert sum(seen) == sum(work.encoder_images(size, n) for size, n in Counter(sizes).items())


def test_the_network_really_sees_so_many_pixels(unrolled_bundle):
    stage = PurifyImages(str(unrolled_bundle), "cpu", 64, 1)
    network = stage.purifier.unrolled
    seen = []
    bands = network._bands
    network._bands = lambda x, **state: seen.append(x[:, 0].numel()) or bands(x, **state)
    with torch.inference_mode():
        for count in (1, 16, 37):
            stage.purifier.purify(torch.zeros(count, 3, 18, 18))
    # Sides are multiples of the network's grid.
    assert 18 % stage.purifier.config.unrolled.grid == 0
    work = Work("cpu", 64, "unrolled")
    assert sum(seen) == sum(work.solver_pixels((18, 18), count) for count in (1, 16, 37))


@pytest.fixture
def corpus(tmp_path, encoded, smooth_pixels, hf_table, write_parquet):
    good = [encoded(pixels) for pixels in smooth_pixels(20, 16, 16, 0)]
    other = [encoded(pixels, "JPEG") for pixels in smooth_pixels(9, 24, 16, 1)]
    write_parquet(tmp_path / "a.parquet", hf_table([*good, b"rubbish", None]), 5)
    # Another shard with other columns.
    write_parquet(tmp_path / "b.parquet", hf_table(other).drop_columns(["caption"]))
    return tmp_path


@pytest.fixture(scope="module")
def timer(unrolled_bundle) -> SampleTimer:
    recipe = StageRecipe(str(unrolled_bundle), "cpu", 1, 64, PurifyOptions(), "image")
    return SampleTimer(recipe, Work("cpu", 64, "unrolled"))


def test_a_sample_goes_through_all_stages(corpus, timer):
    units = survey_corpus(list_corpus(str(corpus)), PLAN, OutputState()).units_to_do
    sample = timer.take(draw_sample(units, 100), 0.0, 60.0, 8)
    assert sample.images == 31
    assert sum(unit.rows for unit in sample.units) == 31
    assert sum(unit.quarantined for unit in sample.units) == 2
    sizes = Counter[tuple[int, int]]()
    for unit in sample.units:
        sizes.update(unit.sizes)
    assert sizes == {(16, 16): 20, (24, 16): 9}
    assert Counter({c.size: c.rows for c in sample.chunks}) == {(16, 16): 20, (24, 16): 9}
    assert all(min(c.encode_s, c.select_s, c.purify_s) > 0 for c in sample.chunks)
    assert (sample.written_rows, sample.unreadable) == (31, ())
    assert min(sample.written_bytes, sample.written_s, sample.cpu_s, sample.clock_s, sample.memory_mib) > 0
    assert all(unit.read_s > 0 and unit.decode_s > 0 for unit in sample.units)


def test_time_that_is_left_is_used_and_time_that_is_not_ends_it(corpus, timer):
    units = survey_corpus(list_corpus(str(corpus)), PLAN, OutputState()).units_to_do
    draws = draw_sample(units, 100)
    again = timer.take(draws, 1.0, 60.0, 8)
    assert len(again.chunks) > 2
    assert again.written_rows == 31
    short = timer.take(draws, 5.0, 0.0, 8)
    assert len(short.units) == len(short.chunks) == 1


def test_what_cannot_be_read_is_told_and_the_rest_is_taken(corpus, timer):
    units = survey_corpus(list_corpus(str(corpus)), PLAN, OutputState()).units_to_do
    (corpus / "b.parquet").unlink()
    sample = timer.take(draw_sample(units, 100), 0.0, 60.0, 8)
    assert sample.images == 22
    assert sample.unreadable
    assert "b.parquet" in sample.unreadable[0]


def test_samples_of_several_processes_are_one(corpus, timer):
    units = survey_corpus(list_corpus(str(corpus)), PLAN, OutputState()).units_to_do
    draws = draw_sample(units, 100)
    parts = [timer.take(draws[at::2], 0.0, 60.0, 8) for at in range(2)]
    whole = merged(parts)
    assert whole.images == 31
    assert whole.units == (*parts[0].units, *parts[1].units)
    assert whole.memory_mib == max(part.memory_mib for part in parts)
    assert merged([]) == Sample()
