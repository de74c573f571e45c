"""The trained reconstruction in a bundle: the network's own answer, which no neighbour or tile changes."""

from dataclasses import replace

import pytest
import torch

from acsr_ray.artifacts import ArtifactError
from acsr_ray.clustering.selection import Selection
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.unrolled import (
    KEPT_SIDE,
    UnrolledReconstruction,
    fill_up,
    micro_batch,
    restore_unrolled,
)
from acsr_ray.sparse.noise import noise_level
from acsr_ray.sparse.tikhonov import tikhonov_split
from acsr_ray.sparse.unrolled import UnrolledConfig

SHARINGS = ("global", "thresholds", "filters")


@pytest.fixture(scope="module")
def bundles(make_unrolled_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {sharing: make_unrolled_bundle(folder / sharing, sharing) for sharing in SHARINGS}


@pytest.fixture(scope="module")
def batch(smooth_pixels):
    """Return images (n, 3, h, w) in [0, 1] of a size."""

    def make(count, height=16, width=16, seed=0):
        pixels = torch.from_numpy(smooth_pixels(count, height, width, seed))
        return pixels.permute(0, 3, 1, 2).contiguous() / 255

    return make


def assert_same_bits(one, two):
    for field in ("images", "class_id", "cluster_id", "distance", "residual", "solved"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field


def joined(outcomes):
    fields = ("images", "class_id", "cluster_id", "distance", "residual", "solved")
    return type(outcomes[0])(*(torch.cat([getattr(o, f) for o in outcomes]) for f in fields))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("size", [(16, 16), (7, 23), (1, 1)])
def test_it_is_the_network_of_the_bundle(bundles, batch, sharing, size):
    purifier, images = Purifier.load(bundles[sharing]), batch(5, *size, seed=4)
    outcome = purifier.purify(images)
    assert outcome.solved.all()
    network = restore_unrolled(load_bundle(bundles[sharing]))
    selection = purifier.select(purifier.latents(images))
    with torch.no_grad():
        for row in range(5):
            bands = tikhonov_split(images[row : row + 1], purifier.config.tikhonov)
            expected = network(*bands, selection.index[row : row + 1]).clamp(0, 1)
            torch.testing.assert_close(outcome.images[row : row + 1], expected, rtol=0, atol=1e-6)
    if size != (1, 1):
        assert (outcome.images - images).abs().max() > 1 / 255


def test_the_clusters_matter_where_they_have_something_of_their_own(bundles, batch):
    images = batch(6)
    for sharing in SHARINGS:
        purifier = Purifier.load(bundles[sharing])
        rebuilt = [
            purifier.reconstruct(images, Selection(torch.full((6,), k), torch.zeros(6))).images
            for k in (0, 3)
        ]
        assert torch.equal(*rebuilt) == (sharing == "global")


@pytest.mark.parametrize("sharing", SHARINGS)
def test_pixels_do_not_depend_on_the_batch_size(bundles, batch, sharing):
    purifier, images = Purifier.load(bundles[sharing]), batch(64, seed=6)
    with torch.no_grad():
        whole = purifier.purify(images)
        assert len(set(whole.cluster_id.tolist())) + len(set(whole.class_id.tolist())) > 3
        for part in (1, 7):
            assert_same_bits(joined([purifier.purify(p) for p in images.split(part)]), whole)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("size", [(16, 16), (21, 13)])
def test_pixels_do_not_depend_on_order_or_neighbours(bundles, batch, sharing, size):
    purifier, images = Purifier.load(bundles[sharing]), batch(20, *size, seed=6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = purifier.purify(images)
        assert torch.equal(purifier.purify(images[order]).images, whole.images[order])
        strangers = batch(13, *size, seed=100)
        mixed = purifier.purify(torch.cat([strangers[:9], images[:5], strangers[9:]]))
        assert torch.equal(mixed.images[9:14], whole.images[:5])
        layout = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(purifier.purify(layout).images, whole.images)


def test_the_papers_reconstruction_is_bit_identical_in_such_a_bundle(bundles, tiny_bundle, batch):
    images = batch(20, seed=7)
    with torch.no_grad():
        plain = Purifier.load(tiny_bundle).purify(images)
        for sharing in SHARINGS:
            asked = Purifier.load(bundles[sharing], options=PurifyOptions(reconstruction="cbpdn"))
            assert_same_bits(asked.purify(images), plain)
            assert not torch.equal(Purifier.load(bundles[sharing])(images), plain.images)


def test_a_bundle_may_keep_the_papers_reconstruction_as_its_default(
    make_unrolled_bundle, tiny_bundle, bundles, batch, tmp_path
):
    images = batch(3)
    make_unrolled_bundle(tmp_path / "b", reconstruction="cbpdn")
    assert torch.equal(Purifier.load(tmp_path / "b")(images), Purifier.load(tiny_bundle)(images))
    asked = Purifier.load(tmp_path / "b", options=PurifyOptions(reconstruction="unrolled"))
    assert torch.equal(asked(images), Purifier.load(bundles["global"])(images))


@pytest.mark.parametrize(
    ("stride", "deeper", "size"),
    [(3, (), (300, 70)), (3, (4,), (60, 320)), (1, (4,), (310, 20)), (5, (), (290, 300)), (3, (), (263, 4))],
)
def test_a_large_image_by_tiles_is_the_network_on_the_whole(
    make_unrolled_bundle, batch, tmp_path, stride, deeper, size
):
    shape = UnrolledConfig(iterations=1, stride=stride, deeper=deeper)
    bundle = load_bundle(make_unrolled_bundle(tmp_path / "b", network=shape))
    reconstruction = UnrolledReconstruction(bundle, "cpu")
    assert max(size) > KEPT_SIDE
    images = batch(1, *size, seed=2)
    lowpass, highpass = tikhonov_split(images, bundle.config.tikhonov)
    with torch.no_grad():
        tiled = reconstruction(lowpass, highpass, torch.zeros(1, dtype=torch.int64))
        whole = restore_unrolled(bundle)(lowpass, highpass)
    assert (tiled - whole).abs().max() < 1e-5
    assert (whole - images).abs().max() > 1 / 255


def test_every_tile_is_told_the_noise_of_the_whole_image(make_unrolled_bundle, batch, tmp_path):
    bundle = load_bundle(
        make_unrolled_bundle(tmp_path / "b", network=UnrolledConfig(iterations=1, stride=3, deeper=()))
    )
    weights = {n: t + 0.5 if "noise_slopes" in n else t for n, t in bundle.reconstruction.items()}
    bundle = replace(bundle, reconstruction=weights)
    images = batch(1, 320, 24, seed=3)
    # Noise in one half only: tiles of their own would see other levels.
    images[..., :160, :] = tikhonov_split(images, bundle.config.tikhonov)[0][..., :160, :].clamp(0, 1)
    lowpass, highpass = tikhonov_split(images, bundle.config.tikhonov)
    halves = [noise_level(half) for half in highpass.chunk(2, 2)]
    assert halves[1] > 1.5 * halves[0]
    with torch.no_grad():
        tiled = UnrolledReconstruction(bundle, "cpu")(lowpass, highpass, torch.zeros(1, dtype=torch.int64))
        whole = restore_unrolled(bundle)(lowpass, highpass)
    assert (tiled - whole).abs().max() < 1e-5


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("strength", [0.01, 0.5, 1.5, 4.0])
def test_strength_is_a_factor_on_the_change(bundles, batch, sharing, strength):
    images = batch(6, seed=9)
    with torch.no_grad():
        once = Purifier.load(bundles[sharing])
        index = once.select(once.latents(images)).index
        bands = tikhonov_split(images, once.config.tikhonov)
        change = once.unrolled(*bands, index) - images
        got = Purifier.load(bundles[sharing], options=PurifyOptions(strength=strength))(images)
    torch.testing.assert_close(got, (images + strength * change).clamp(0, 1), rtol=0, atol=1e-6)
    assert change.flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("sharing", SHARINGS)
def test_it_can_be_attacked_as_a_whole(bundles, batch, sharing):
    purifier, images = Purifier.load(bundles[sharing]), batch(3).requires_grad_()
    (gradient,) = torch.autograd.grad(purifier(images).square().sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()
    assert not any(parameter.requires_grad for parameter in purifier.parameters())


@pytest.mark.parametrize("strength", [1.0, "auto"])
def test_gradient_agrees_with_finite_differences(bundles, batch, strength):
    """The differences are of the formula in double precision, which a thousand kinks leave smooth enough."""
    bundle = load_bundle(bundles["filters"])
    purifier = Purifier(bundle, options=PurifyOptions(strength=strength))
    images = batch(1, seed=2).clamp(0.2, 0.8)
    index = purifier.select(purifier.latents(images)).index
    network = restore_unrolled(bundle).double()

    def formula(image):
        lowpass, highpass = tikhonov_split(image, bundle.config.tikhonov)
        level = noise_level(highpass)
        factor = bundle.config.auto_strength.of(level) if strength == "auto" else 1
        return (image + factor * (network(lowpass, highpass, index) - image)).clamp(0, 1)

    direction, weights = (
        torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1)
    )
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((purifier(leaf) * weights).sum(), leaf)
    with torch.no_grad():
        ahead, behind = (formula(images.double() + step * direction) for step in (1e-7, -1e-7))
        slope = ((ahead - behind) * weights).sum().item() / 2e-7
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=0.01, abs=0.02)


def test_training_mode_around_the_purifier_changes_nothing(bundles, batch):
    images = batch(5)
    for sharing in SHARINGS:
        purifier = Purifier.load(bundles[sharing])
        before = purifier(images)
        torch.nn.Sequential(purifier, torch.nn.Flatten()).train()
        assert torch.equal(purifier(images), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_leave_the_low_band(bundles, batch, value):
    bundle = load_bundle(bundles["filters"])
    purifier, images = Purifier(bundle), batch(32, seed=6)
    healthy = purifier.purify(images)
    index = purifier.select(purifier.latents(images)).index
    broken = int(index[0])
    name = f"members.{broken}.analysis.0.0"
    weights = {**bundle.reconstruction, name: torch.full_like(bundle.reconstruction[name], value)}
    outcome = Purifier(replace(bundle, reconstruction=weights)).purify(images)
    hit = index == broken
    assert hit.any()
    assert not hit.all()
    assert torch.equal(outcome.solved, ~hit)
    assert torch.equal(outcome.images[~hit], healthy.images[~hit])
    lowpass, _ = tikhonov_split(images[hit], purifier.config.tikhonov)
    assert torch.allclose(outcome.images[hit], lowpass.clamp(0, 1), atol=1e-6)
    assert torch.isfinite(outcome.residual).all()


def test_a_bundle_without_a_network(tiny_bundle):
    with pytest.raises(ArtifactError, match="tiny has no unrolled reconstruction"):
        UnrolledReconstruction(load_bundle(tiny_bundle), "cpu")


def test_filling_up_repeats_the_first():
    assert fill_up(torch.tensor([3, 5]), 4).tolist() == [3, 5, 3, 3]
    assert fill_up(torch.tensor([3, 5]), 2).tolist() == [3, 5]


def test_the_loaded_weights_are_the_bundles(bundles):
    for sharing in SHARINGS:
        bundle = load_bundle(bundles[sharing])
        loaded = restore_unrolled(bundle)
        assert not loaded.training
        assert loaded.state_dict().keys() == bundle.reconstruction.keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, bundle.reconstruction[name]), name


def test_bfloat16_moves_pixels_little_and_only_by_the_image(bundles, batch):
    plain, half = (
        Purifier.load(bundles["global"], options=PurifyOptions(precision=precision))
        for precision in ("float32", "bfloat16")
    )
    images = batch(20, seed=9)
    outcome = half.purify(images)
    assert outcome.images.dtype == torch.float32
    change = (outcome.images - plain.purify(images).images).abs().max().item()
    assert 0 < change < 4 / 255
    assert torch.equal(outcome.class_id, plain.purify(images).class_id)
    assert_same_bits(outcome, joined([half.purify(part) for part in images.split(3)]))


def test_precision_is_part_of_a_runs_identity(bundles):
    config = load_bundle(bundles["global"]).config
    assert config.changed(PurifyOptions(precision="float32")) == config.changed(PurifyOptions())
    assert config.changed(PurifyOptions(precision="bfloat16"))["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("size", "expected"), [((32, 32), 16), ((64, 64), 16), ((128, 128), 4), ((64, 100), 10), ((129, 128), 1)]
)
def test_larger_images_come_in_smaller_calls(size, expected):
    assert micro_batch(*size, "cpu") == expected


@pytest.mark.parametrize(
    ("size", "expected"), [((32, 32), 256), ((64, 64), 256), ((224, 224), 20), ((4000, 3000), 1)]
)
def test_calls_on_gpus_have_as_many_pixels_whatever_the_size(size, expected):
    assert micro_batch(*size, "cuda") == expected
