"""One code path, two devices: CUDA selects the same clusters and gives the same pixels to 1e-4."""

import pytest
import torch

from acsr_ray.purification.purifier import Purifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("size", [(16, 16), (33, 47), (200, 210)])
def test_cuda_agrees_with_cpu(tiny_bundle, smooth_pixels, size):
    images = torch.from_numpy(smooth_pixels(5, *size, 0)).permute(0, 3, 1, 2) / 255
    on_cpu = Purifier.load(tiny_bundle).purify(images)
    on_gpu = Purifier.load(tiny_bundle, "cuda").purify(images)
    assert torch.equal(on_gpu.class_id.cpu(), on_cpu.class_id)
    assert torch.equal(on_gpu.cluster_id.cpu(), on_cpu.cluster_id)
    assert torch.allclose(on_gpu.distance.cpu(), on_cpu.distance, rtol=1e-3)
    assert torch.allclose(on_gpu.images.cpu(), on_cpu.images, atol=1e-4)


def test_it_goes_along_with_the_model_around_it(tiny_bundle, unrolled_bundle, smooth_pixels):
    images = torch.from_numpy(smooth_pixels(5, 16, 16, 0)).permute(0, 3, 1, 2) / 255
    for bundle in (tiny_bundle, unrolled_bundle):
        moved = torch.nn.Sequential(Purifier.load(bundle), torch.nn.Flatten()).to("cuda")
        expected = Purifier.load(bundle, "cuda")(images)
        assert torch.equal(moved(images), expected.flatten(1))
        back = moved.cpu()
        assert torch.equal(back(images), Purifier.load(bundle)(images).flatten(1))
