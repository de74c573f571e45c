"""The PixelCNN: a distribution, causal, and decoded as one pixel after the other would be."""

import copy

import pytest
import torch

from acsr_ray.artifacts import ArtifactError
from acsr_ray.models.pixel_cnn import (
    PixelCnn,
    PixelCnnConfig,
    causal_offsets,
    channel_log_mass,
    load_pixel_cnn,
    log_likelihood,
    most_likely_nearby,
    save_pixel_cnn,
)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return PixelCnn(PixelCnnConfig(radius=2, width=16, blocks=1, mixtures=3)).requires_grad_(False)


def levels_of(*size, seed=0):
    return torch.randint(256, size, generator=torch.Generator().manual_seed(seed)).float()


def parameters_of(model, levels, image, row, column):
    index = (torch.tensor([value]) for value in (image, row, column))
    return model(model.neighbourhoods(model.pad(levels), *index))


@pytest.mark.parametrize("scale", [-7.0, -2.0, 1.0])
def test_every_channel_is_a_distribution_over_256_levels(scale):
    parameters = torch.randn(4, 10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters[:, 4:7] = scale
    everything = torch.arange(256.0).double().expand(4, 256)
    for channel in range(3):
        earlier = levels_of(4, channel).double()
        mass = channel_log_mass(parameters, channel, earlier, everything).exp().sum(1)
        assert torch.allclose(mass, torch.ones_like(mass), atol=1e-3)


def test_likelihood_is_the_product_of_the_conditionals():
    parameters = torch.randn(1, 10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pixel = torch.tensor([[30.0, 200, 90]], dtype=torch.float64)
    weight, everything = parameters[:, 0].log_softmax(1), torch.arange(256.0).double()[None]
    expected = 0.0
    for channel in range(3):
        mass = channel_log_mass(parameters, channel, pixel[:, :channel], everything) + weight[:, None]
        chosen = mass[:, int(pixel[0, channel])]
        expected += (chosen.logsumexp(1) - weight.logsumexp(1)).item()
        weight = chosen
    assert log_likelihood(parameters, pixel).item() == pytest.approx(expected)


def test_blue_depends_on_red_and_green_but_red_on_neither():
    parameters = torch.randn(1, 10, 2, generator=torch.Generator().manual_seed(2))
    asked = torch.tensor([[100.0]])
    blue = [
        channel_log_mass(parameters, 2, torch.tensor([pair]), asked)
        for pair in ([10.0, 20.0], [200.0, 20.0], [10.0, 220.0])
    ]
    assert not torch.equal(blue[0], blue[1])
    assert not torch.equal(blue[0], blue[2])


def test_neighbourhood_is_causal_and_no_wider_than_the_radius(model):
    levels = levels_of(1, 3, 7, 8)
    row, column, radius = 4, 3, 2
    here = parameters_of(model, levels, 0, row, column)
    for i in range(7):
        for j in range(8):
            changed = levels.clone()
            changed[0, :, i, j] = 255 - changed[0, :, i, j]
            seen = not torch.equal(here, parameters_of(model, changed, 0, row, column))
            assert seen == ((i - row, j - column) in causal_offsets(radius)), (i, j)


def test_the_border_is_not_black(model):
    levels = torch.full((1, 3, 3, 3), 127.5)
    assert not torch.equal(parameters_of(model, levels, 0, 0, 0), parameters_of(model, levels, 0, 2, 2))


def one_after_the_other(model, levels, reach):
    """Greedy decoding written as the definition says, in raster order."""
    result = levels.clone()
    _, _, height, width = levels.shape
    for row in range(height):
        for column in range(width):
            parameters = parameters_of(model, result, 0, row, column)
            weight = parameters[:, 0].log_softmax(1)
            for channel in range(3):
                given = int(levels[0, channel, row, column])
                allowed = torch.arange(max(0, given - reach), min(255, given + reach) + 1).to(levels)[None]
                earlier = result[:, :channel, row, column]
                mass = channel_log_mass(parameters, channel, earlier, allowed) + weight[:, None]
                best = int(mass.logsumexp(2).argmax())
                result[0, channel, row, column] = allowed[0, best]
                weight = mass[:, best]
    return result


@pytest.mark.parametrize("size", [(6, 7), (1, 5), (4, 1), (3, 2)])
def test_diagonals_decode_as_raster_order_does(model, size):
    # In float64, since the number of pixels in a product decides the last bit, and that a near tie.
    exact, levels = copy.deepcopy(model).double(), levels_of(1, 3, *size, seed=4).double()
    assert torch.equal(most_likely_nearby(exact, levels, 9), one_after_the_other(exact, levels, 9))


def test_decoding_stays_in_the_ball(model):
    levels = levels_of(3, 3, 6, 6, seed=5)
    decoded = most_likely_nearby(model, levels, 12)
    assert (decoded - levels).abs().max() <= 12
    assert decoded.min() >= 0
    assert decoded.max() <= 255
    assert torch.equal(decoded, decoded.round())
    assert torch.equal(most_likely_nearby(model, levels, 0), levels)


def test_round_trip(model, tmp_path):
    save_pixel_cnn(tmp_path, model, {})
    loaded = load_pixel_cnn(tmp_path)
    assert loaded.config == model.config
    levels = levels_of(1, 3, 5, 5)
    assert torch.equal(parameters_of(loaded, levels, 0, 3, 3), parameters_of(model, levels, 0, 3, 3))
    with pytest.raises(ArtifactError, match="no pixel_cnn"):
        load_pixel_cnn(tmp_path / "elsewhere")
