"""The Purifier: its input contract, the paper's formula, and pixels that no neighbour can change."""

import pytest
import torch

from acsr_ray.models.classifier import encode, restore_encoder
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.purifier import Purifier, check_images
from acsr_ray.purification.tiles import code_tiles
from acsr_ray.sparse.admm import CACHED_SIZES
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.tikhonov import tikhonov_split


@pytest.fixture(scope="module")
def purifier(tiny_bundle):
    return Purifier.load(tiny_bundle)


@pytest.fixture(scope="module")
def batch(smooth_pixels):
    """Return images (n, 3, h, w) in [0, 1] of a size."""

    def make(count, height=16, width=16, seed=0):
        pixels = torch.from_numpy(smooth_pixels(count, height, width, seed))
        return pixels.permute(0, 3, 1, 2).contiguous() / 255

    return make


def with_value(value):
    images = torch.full((2, 3, 4, 4), 0.5)
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), "shape"),
        (torch.zeros(1, 1, 3, 4, 4), "shape"),
        (torch.zeros(2, 1, 4, 4), "shape"),
        (torch.zeros(2, 4, 4, 3), "shape"),
        (torch.zeros(2, 3, 0, 4), "shape"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "floating point"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "floating point"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.bool), "floating point"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.complex64), "floating point"),
        (with_value(float("nan")), "finite"),
        (with_value(float("inf")), "finite"),
        (with_value(-float("inf")), "finite"),
        (with_value(1.001), r"\[0, 1\], got values in \[0.5, 1.001\]"),
        (with_value(-0.001), r"\[0, 1\]"),
        (torch.full((1, 3, 4, 4), 255.0), r"\[0, 1\]"),
        (torch.zeros(2, 3, 4, 4).numpy(), "torch.Tensor, got ndarray"),
        (None, "torch.Tensor, got NoneType"),
        ([[0.5]], "torch.Tensor, got list"),
    ],
)
def test_bad_input_is_refused(purifier, images, message):
    with pytest.raises(ValueError, match=message):
        purifier(images)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_range_are_accepted(value):
    check_images(with_value(value))


@pytest.mark.parametrize("size", [(16, 16), (9, 5)])
def test_empty_batch(purifier, size):
    outcome = purifier.purify(torch.zeros(0, 3, *size))
    assert outcome.images.shape == (0, 3, *size)
    for field in ("class_id", "cluster_id", "distance", "residual", "solved"):
        assert getattr(outcome, field).shape == (0,), field


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 16), (33, 47), (70, 100)])
def test_output_contract_for_any_size(purifier, batch, size):
    images = batch(2, *size, seed=4)
    outcome = purifier.purify(images)
    assert outcome.images.shape == images.shape
    assert outcome.images.dtype == torch.float32
    assert outcome.images.min() >= 0
    assert outcome.images.max() <= 1
    assert outcome.class_id.dtype == outcome.cluster_id.dtype == torch.int32
    assert outcome.solved.all()
    change = (outcome.images - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
    assert torch.allclose(outcome.residual, change, atol=1e-6)
    if size != (1, 1):
        assert (outcome.images - images).abs().max() > 1 / 255


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_float_types_are_converted(purifier, batch, dtype):
    images = batch(2).to(dtype)
    outcome = purifier(images)
    assert outcome.dtype == torch.float32
    assert torch.equal(outcome, purifier(images.float()))


def test_constant_images_keep_their_colour(purifier):
    images = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 3, 20, 20)
    assert (purifier(images) - images).abs().max() < 1e-5


def test_input_is_not_changed(purifier, batch):
    images = batch(3)
    before = images.clone()
    purifier(images)
    assert torch.equal(images, before)


def test_batches_mix_clusters(purifier, batch):
    """Without this the tests of batch composition would say little."""
    outcome = purifier.purify(batch(64))
    pairs = set(zip(outcome.class_id.tolist(), outcome.cluster_id.tolist(), strict=True))
    assert len(pairs) >= 3


def assert_same_bits(one, two):
    for field in ("images", "class_id", "cluster_id", "distance", "residual", "solved"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field


def joined(outcomes):
    fields = ("images", "class_id", "cluster_id", "distance", "residual", "solved")
    return type(outcomes[0])(*(torch.cat([getattr(o, f) for o in outcomes]) for f in fields))


@pytest.mark.parametrize("size", [(16, 16), (21, 13), (66, 65)])
def test_pixels_do_not_depend_on_the_batch_size(purifier, batch, size):
    count = 64 if size == (16, 16) else 9
    images = batch(count, *size, seed=6)
    with torch.no_grad():
        whole = purifier.purify(images)
        for part in (1, 7):
            assert_same_bits(joined([purifier.purify(p) for p in images.split(part)]), whole)


@pytest.mark.parametrize("seed", [0, 1])
def test_pixels_do_not_depend_on_order_or_neighbours(purifier, batch, seed):
    images = batch(64, seed=6)
    with torch.no_grad():
        whole = purifier.purify(images)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        shuffled = purifier.purify(images[order])
        assert torch.equal(shuffled.images, whole.images[order])
        assert torch.equal(shuffled.distance, whole.distance[order])
        strangers = batch(40, seed=100 + seed)
        mixed = purifier.purify(torch.cat([strangers[:13], images[:5], strangers[13:]]))
        assert torch.equal(mixed.images[13:18], whole.images[:5])


def reference(directory, image):
    """Purify one image (1, 3, H, W) by the formula of the paper, with nothing of the Purifier."""
    bundle = load_bundle(directory)
    config, gaussians = bundle.config, bundle.gaussians
    encoder = restore_encoder(config.encoder, bundle.encoder)
    latent = encode(encoder, image, config.encoder.image_size)[0].double()
    squared = torch.stack(
        [
            (whitening.double() @ (latent - mean.double())).square().sum()
            for mean, whitening in zip(gaussians.mean, gaussians.whitening, strict=True)
        ]
    )
    chosen = int(squared.argmin())
    lowpass, highpass = tikhonov_split(image, config.tikhonov)
    solver = Cbpdn(bundle.atoms[chosen], config.cbpdn)
    purified = (lowpass + code_tiles(solver, highpass)).clamp(0, 1)
    return (
        purified,
        int(gaussians.class_id[chosen]),
        int(gaussians.cluster_id[chosen]),
        squared[chosen].sqrt(),
    )


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (70, 100)])
def test_it_is_the_formula_of_the_paper(purifier, tiny_bundle, batch, size):
    images = batch(4, *size, seed=8)
    outcome = purifier.purify(images)
    for position in range(len(images)):
        expected, class_id, cluster_id, distance = reference(tiny_bundle, images[position : position + 1])
        assert (outcome.images[position] - expected[0]).abs().max() < 1e-4
        assert (outcome.class_id[position], outcome.cluster_id[position]) == (class_id, cluster_id)
        assert outcome.distance[position] == pytest.approx(distance.item(), rel=1e-4)


def test_it_can_be_attacked_as_a_whole(purifier, batch):
    images = batch(3).requires_grad_()
    (gradient,) = torch.autograd.grad(purifier(images).square().sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()


def test_gradient_agrees_with_finite_differences(tiny_bundle, batch):
    purifier = Purifier.load(tiny_bundle)
    # The derivative is that of the optimum.
    tight = purifier.config.cbpdn.model_copy(update={"tolerance": 1e-4, "rounds": 1000})
    purifier.solver = Cbpdn(purifier.solver.atoms, tight)
    images = batch(1, seed=2).clamp(0.2, 0.8)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((purifier(leaf) * weights).sum(), leaf)
    # Longer steps change the support.
    step = 1e-4
    with torch.no_grad():
        ahead, behind = (purifier(images + s * step * direction) for s in (1, -1))
        slope = ((ahead - behind) * weights).sum() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=0.05)


def test_weights_are_frozen(purifier, batch):
    assert not any(parameter.requires_grad for parameter in purifier.parameters())
    assert not purifier.encoder.training


def test_a_failed_solver_leaves_the_low_band(tiny_bundle, batch):
    purifier = Purifier.load(tiny_bundle)
    images = batch(32, seed=6)
    healthy = purifier.purify(images)
    broken = int(purifier.select(purifier.latents(images)).index[0])
    purifier = Purifier.load(tiny_bundle)
    purifier.solver.atoms[broken] = float("nan")
    outcome = purifier.purify(images)
    hit = purifier.select(purifier.latents(images)).index == broken
    assert hit.any()
    assert not hit.all()
    assert torch.equal(outcome.solved, ~hit)
    assert torch.equal(outcome.images[~hit], healthy.images[~hit])
    lowpass, _ = tikhonov_split(images[hit], purifier.config.tikhonov)
    assert torch.allclose(outcome.images[hit], lowpass.clamp(0, 1), atol=1e-6)
    assert torch.isfinite(outcome.residual).all()


def test_training_mode_around_the_purifier_changes_nothing(tiny_bundle, smooth_pixels):
    purifier = Purifier.load(tiny_bundle)
    images = torch.from_numpy(smooth_pixels(3, 16, 16, 1)).permute(0, 3, 1, 2) / 255
    before = purifier.purify(images)
    torch.nn.Sequential(purifier, torch.nn.Flatten()).train()
    after = purifier.purify(images)
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.distance, before.distance)


def test_gradients_after_a_call_in_inference_mode(tiny_bundle, smooth_pixels):
    purifier = Purifier.load(tiny_bundle)
    images = torch.from_numpy(smooth_pixels(2, 16, 16, 1)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        purifier(images)
    images = images.clone().requires_grad_()
    purifier(images).square().sum().backward()
    assert images.grad.abs().max() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_latents_and_distances_do_not_depend_on_batch_or_memory_layout(tiny_bundle, smooth_pixels, layout):
    purifier = Purifier.load(tiny_bundle)
    images = torch.from_numpy(smooth_pixels(70, 16, 16, 3)).permute(0, 3, 1, 2) / 255
    alone = torch.cat([purifier.latents(image.contiguous()) for image in images.split(1)])
    together = purifier.latents(images.contiguous(memory_format=layout))
    assert torch.equal(together, alone)
    assert torch.equal(purifier.select(together).distance, purifier.select(alone).distance)


def test_factors_of_many_sizes_do_not_pile_up(make_bundle, tmp_path):
    solver = CbpdnConfig(iterations=1, solver="admm")
    purifier = Purifier.load(make_bundle(tmp_path / "admm", cbpdn=solver))
    for side in range(8, 20):
        purifier(torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(side)))
    assert max(len(factors) for factors in purifier.solver._admm._factors) == CACHED_SIZES
