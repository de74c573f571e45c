"""A GPU that lacks memory (`-m gpu`): a unit is halved until it fits, and only a row too large alone goes."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from acsr_ray.columns import DISTANCE, HEIGHT, INDEX, PIXELS, PURIFIED, QUARANTINED, REASON, STATUS, WIDTH
from acsr_ray.purification.failures import apply_by_halves
from acsr_ray.purification.stages import EncodeImages, PurifyImages, SelectClusters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUNDLE = "cifar10-small"


@pytest.fixture
def capped():
    """Let PyTorch take so many MiB of the GPU and no more."""

    def cap(mebibytes):
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(mebibytes * 2**20 / whole)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def decoded(pixels):
    return pa.table(
        {
            PIXELS: pa.array([image.tobytes() for image in pixels], pa.large_binary()),
            HEIGHT: pa.array([image.shape[0] for image in pixels], pa.int32()),
            WIDTH: pa.array([image.shape[1] for image in pixels], pa.int32()),
            STATUS: pa.array([PURIFIED] * len(pixels)),
            REASON: pa.array([None] * len(pixels), pa.string()),
        }
    )


def stages():
    encode = EncodeImages(BUNDLE, "cuda", 1024, threads=1)
    select = SelectClusters(BUNDLE, threads=1)
    purify = PurifyImages(BUNDLE, "cuda", 1024, threads=1)
    return lambda table: purify(select(encode(table)))


def test_a_unit_too_large_for_the_memory_is_purified_in_parts(smooth_pixels, capped):
    table = decoded(list(smooth_pixels(16, 700, 700, 0)))
    apply = stages()
    reserved, outcomes = [], []
    for part in (table.slice(0, 1), table):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        outcomes.append(apply(part))
        reserved.append(torch.cuda.max_memory_reserved() / 2**20)
    alone, together = reserved
    first, whole = outcomes
    print(f"\none image takes {alone:.0f} MiB, {table.num_rows} take {together:.0f}", end="")
    assert together > 1.3 * alone
    assert first[PIXELS][0] == whole[PIXELS][0]
    capped((alone + together) / 2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        apply(table)
    halved = apply_by_halves(apply, table)
    assert halved[STATUS].equals(whole[STATUS])
    assert halved[REASON].equals(whole[REASON])
    assert halved[INDEX].equals(whole[INDEX])
    np.testing.assert_allclose(halved[DISTANCE].to_numpy(), whole[DISTANCE].to_numpy(), rtol=1e-4)
    # Not to the bit: where room lacks, cuDNN takes algorithms that need less of it.
    ours, theirs = (
        np.frombuffer(b"".join(own[PIXELS].to_pylist()), np.uint8).astype(int) for own in (halved, whole)
    )
    assert np.abs(ours - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.999


def test_only_the_row_that_fits_nowhere_is_quarantined(smooth_pixels, capped):
    pixels = list(smooth_pixels(6, 32, 32, 0))
    expected = stages()(decoded(pixels))
    huge = np.zeros((9000, 9000, 3), np.uint8)
    table = decoded([*pixels[:2], huge, *pixels[2:]])
    apply = stages()
    capped(800)
    done = apply_by_halves(apply, table)
    assert done[STATUS].to_pylist() == [PURIFIED] * 2 + [QUARANTINED] + [PURIFIED] * 4
    assert done[REASON].to_pylist() == [None] * 2 + ["out_of_memory"] + [None] * 4
    kept = [0, 1, 3, 4, 5, 6]
    for column in (PIXELS, INDEX, DISTANCE):
        assert done[column].take(pa.array(kept)).to_pylist() == expected[column].to_pylist()
