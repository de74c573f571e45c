"""One code path, two devices (`-m gpu`): what a GPU gives beside what the CPU gives, and beside itself."""

import pytest
import torch

from acsr_ray.benchmark.pictures import images as natural_images
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUNDLES = ("cifar10-small", "imagenet10-small")
# Levels of 255 by which descent to a tolerance and 30 iterations of ADMM may end apart in single pixels.
SOLVERS_APART = 16


def with_solver(bundle, solver):
    """Return a purifier's bundle with a solver by name."""
    cbpdn = bundle.config.cbpdn.model_copy(update={"solver": solver})
    return type(bundle)(
        bundle.config.model_copy(update={"cbpdn": cbpdn}),
        bundle.encoder,
        bundle.gaussians,
        bundle.atoms,
        bundle.reconstruction,
    )


def to_levels(images):
    return (images.cpu() * 255).round()


def compared(what, ours, reference):
    """Print and return largest and mean difference in levels of images that chose one cluster."""
    same = (ours.class_id.cpu() == reference.class_id) & (ours.cluster_id.cpu() == reference.cluster_id)
    apart = 255 * (ours.images.cpu() - reference.images).abs()[same]
    equal = (to_levels(ours.images) == to_levels(reference.images))[same].float().mean().item()
    print(
        f"\n{what}: same cluster {same.float().mean():.4f}, levels apart at most {apart.max():.5f}, "
        f"mean {apart.mean():.2e}, equal in 8 bits {equal:.6f}",
        end="",
    )
    return apart.max().item(), same.float().mean().item(), equal


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (200, 210)])
def test_cuda_agrees_with_cpu(tiny_bundle, smooth_pixels, size):
    bundle = with_solver(load_bundle(str(tiny_bundle)), "admm")
    images = torch.from_numpy(smooth_pixels(5, *size, 0)).permute(0, 3, 1, 2) / 255
    on_cpu = Purifier(bundle).purify(images)
    on_gpu = Purifier(bundle, "cuda").purify(images)
    assert torch.equal(on_gpu.class_id.cpu(), on_cpu.class_id)
    assert torch.equal(on_gpu.cluster_id.cpu(), on_cpu.cluster_id)
    assert torch.allclose(on_gpu.distance.cpu(), on_cpu.distance, rtol=1e-3)
    assert torch.allclose(on_gpu.images.cpu(), on_cpu.images, atol=1e-4)


@pytest.mark.parametrize(("side", "count"), [(32, 200), (64, 24), (160, 3)])
@pytest.mark.parametrize("name", BUNDLES)
def test_packaged_bundles_on_photographs(name, side, count):
    bundle, images = load_bundle(name), natural_images(count, side)
    with torch.inference_mode():
        latents = [Purifier(bundle, device).latents(images.to(device)).cpu() for device in ("cpu", "cuda")]
        apart = ((latents[1] - latents[0]).norm() / latents[0].norm()).item()
        print(f"\n{name} {side}: latents {apart:.2e} apart", end="")
        assert apart < 1e-5

        network = PurifyOptions(reconstruction="unrolled")
        reference = Purifier(bundle, options=network).purify(images)
        ours = Purifier(bundle, "cuda", network).purify(images)
        levels, same, equal = compared(f"{name} {side} unrolled", ours, reference)
        assert same > 0.99
        assert levels < 0.05
        assert equal > 0.999
        half = PurifyOptions(reconstruction="unrolled", precision="bfloat16")
        ours = Purifier(bundle, "cuda", half).purify(images)
        levels, _, _ = compared(f"{name} {side} unrolled, bfloat16 beside float32", ours, reference)
        assert levels < 20

        sparse = PurifyOptions(reconstruction="cbpdn")
        ours = Purifier(bundle, "cuda", sparse).purify(images)
        reference = Purifier(with_solver(bundle, "admm"), options=sparse).purify(images)
        levels, same, equal = compared(f"{name} {side} cbpdn, ADMM beside ADMM", ours, reference)
        assert same > 0.99
        assert levels < 0.05
        assert equal > 0.999
        reference = Purifier(bundle, options=sparse).purify(images)
        levels, _, _ = compared(f"{name} {side} cbpdn, ADMM beside descent", ours, reference)
        assert levels < SOLVERS_APART


@pytest.mark.parametrize("size", [32, 47, 150])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["unrolled", "cbpdn"])
def test_pixels_do_not_depend_on_the_batch(way, precision, size):
    if way == "cbpdn" and precision != "float32":
        pytest.skip("only the network computes in less")
    options = PurifyOptions(reconstruction=way, precision=precision)
    purifier = Purifier.load("cifar10-small", "cuda", options)
    images = natural_images(300 if size == 32 else 9, size)
    with torch.inference_mode():
        whole = purifier.purify(images)
        for batch in (1, 7, 64, 256):
            # One by one, 300 calls would take long and say no more.
            some = images[: 16 * batch]
            parts = [purifier.purify(part) for part in some.split(batch)]
            assert torch.equal(torch.cat([part.images for part in parts]), whole.images[: len(some)])
            assert torch.equal(torch.cat([part.distance for part in parts]), whole.distance[: len(some)])
        reverse = purifier.purify(images.flip(0))
        assert torch.equal(reverse.images.flip(0), whole.images)
        assert torch.equal(Purifier.load("cifar10-small", "cuda", options)(images), whole.images)


def test_gradients_flow(tiny_bundle, smooth_pixels):
    bundle = with_solver(load_bundle(str(tiny_bundle)), "admm")
    images = torch.from_numpy(smooth_pixels(3, 16, 16, 0)).permute(0, 3, 1, 2) / 255
    gradients = []
    for device in ("cpu", "cuda"):
        own = images.clone().to(device).requires_grad_()
        weights = torch.linspace(-1, 1, images.numel(), device=device).view_as(images)
        (Purifier(bundle, device)(own) * weights).sum().backward()
        gradients.append(own.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_it_goes_along_with_the_model_around_it(tiny_bundle, unrolled_bundle, smooth_pixels):
    images = torch.from_numpy(smooth_pixels(5, 16, 16, 0)).permute(0, 3, 1, 2) / 255
    for bundle in (tiny_bundle, unrolled_bundle):
        moved = torch.nn.Sequential(Purifier.load(bundle), torch.nn.Flatten()).to("cuda")
        expected = Purifier.load(bundle, "cuda")(images)
        assert torch.equal(moved(images), expected.flatten(1))
        back = moved.cpu()
        assert torch.equal(back(images), Purifier.load(bundle)(images).flatten(1))
