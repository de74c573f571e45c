"""The real DFT against torch.fft, by matrix products and by FFT."""

import pytest
import torch

from acsr_ray.sparse.fourier import MATMUL_SIDE, RealDft

CPU = torch.device("cpu")
SMALL = [(8, 8), (7, 9), (8, 5), (5, 8), (1, 1), (1, 6), (6, 1), (3, MATMUL_SIDE), (MATMUL_SIDE, 63)]
LARGE = [(70, 66), (MATMUL_SIDE + 1, 4), (4, MATMUL_SIDE + 1), (67, 71)]


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_both_branches_are_covered():
    assert all(RealDft(*size, torch.float64, CPU).by_matmul for size in SMALL)
    assert not any(RealDft(*size, torch.float64, CPU).by_matmul for size in LARGE)


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", SMALL + LARGE)
def test_forward_equals_rfft2(size, trailing):
    images = _random(*size, *trailing)
    spectrum = RealDft(*size, torch.float64, CPU).forward(images)
    expected = torch.fft.rfft2(images, dim=(0, 1)).flatten(0, 1)
    assert spectrum.shape == (2, size[0] * (size[1] // 2 + 1), *trailing)
    torch.testing.assert_close(torch.complex(*spectrum), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", SMALL + LARGE)
def test_inverse_equals_irfft2(size):
    half = size[1] // 2 + 1
    spectrum = RealDft(*size, torch.float64, CPU).forward(_random(*size, 3, seed=1))
    joined = torch.complex(*spectrum).reshape(size[0], half, 3)
    expected = torch.fft.irfft2(joined, s=size, dim=(0, 1))
    got = RealDft(*size, torch.float64, CPU).inverse(spectrum)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SMALL + LARGE)
def test_round_trip(size, dtype):
    images = _random(*size, 2, 3, seed=2).to(dtype)
    dft = RealDft(*size, dtype, CPU)
    back = dft.inverse(dft.forward(images))
    assert back.dtype == dtype
    torch.testing.assert_close(back, images, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("size", [(6, 7), (70, 66)])
def test_multiplies_to_circular_convolution(size):
    image, kernel = _random(*size, 1, seed=3), torch.zeros(*size, 1, dtype=torch.float64)
    kernel[0, 0], kernel[2, 1] = 0.5, -2.0
    dft = RealDft(*size, torch.float64, CPU)
    product = torch.complex(*dft.forward(image)) * torch.complex(*dft.forward(kernel))
    got = dft.inverse(torch.stack((product.real, product.imag)))
    expected = 0.5 * image - 2 * image.roll((2, 1), (0, 1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_accepts_strided_input():
    images = _random(2, 3, 6, 5, seed=4)
    strided = images.permute(2, 3, 0, 1)
    dft = RealDft(6, 5, torch.float64, CPU)
    assert torch.equal(dft.forward(strided), dft.forward(strided.contiguous()))
