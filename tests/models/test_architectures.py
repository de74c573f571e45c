"""The networks of target classifiers: sizes against the papers' tables, shapes, gradients, independence."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acsr_ray.models.alexnet import AlexNet
from acsr_ray.models.blocks import conv_norm, scaled
from acsr_ray.models.googlenet import GoogLeNet
from acsr_ray.models.resnet import ResNet50
from acsr_ray.models.targets import NETWORKS
from acsr_ray.models.vgg import Vgg16

J = 5
ALL = pytest.mark.parametrize("name", NETWORKS)


def _network(name, width=0.25, stem_stride=1, num_classes=J, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETWORKS[name](num_classes, width, stem_stride)


def _images(count, side=32, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def _meta(build):
    """Build without memory: for counting only."""
    with torch.device("meta"):
        return build(1000, 1.0, 1)


def _count(network, *kinds):
    modules = [module for module in network.modules() if isinstance(module, kinds)]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _norm_channels(network):
    return sum(module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize(("side", "width", "stem_stride"), [(32, 0.25, 1), (64, 0.25, 2), (32, 0.5, 1)])
@ALL
def test_logits_and_gradients(name, side, width, stem_stride):
    network = _network(name, width, stem_stride).train()
    images = _images(4, side).requires_grad_(True)
    logits = network(images)
    assert logits.shape == (4, J)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert torch.isfinite(images.grad).all()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()
    for key, value in network.named_parameters():
        # A residual block starts as the identity: its last norm hides what is before it for one step.
        hidden = name == "resnet50" and ".body." in key and ".body.2.1." not in key
        assert hidden or value.grad.abs().max() > 0, key
    assert all(torch.isfinite(value.grad).all() for value in network.parameters())


@ALL
def test_rectangular_images_are_taken(name):
    assert _network(name)(_images(2, 64)[..., :32]).shape == (2, J)


@ALL
def test_stem_stride_quarters_the_pixels_and_keeps_the_weights(name):
    fine, coarse = _network(name, 0.1), _network(name, 0.1, stem_stride=2)
    coarse.load_state_dict(fine.state_dict())
    seen = {}
    for network in (fine.eval(), coarse.eval()):
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(lambda _, __, out, key=network: seen.__setitem__(key, out.shape[-1]))
        network(_images(1, 64))
    assert (seen[fine], seen[coarse]) == (64, 32)


@ALL
def test_a_training_batch_of_one_image_works(name):
    loss = F.cross_entropy(_network(name, 0.1).train()(_images(1)), torch.tensor([1]))
    assert torch.isfinite(loss)


@ALL
def test_neighbours_in_the_batch_do_not_matter_in_evaluation_mode(name):
    network = _network(name).train()
    # Running statistics of some data, and last norms away from zero, so that every branch counts.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    network(_images(8, seed=1))
    network.eval()
    with torch.no_grad():
        whole = network(_images(6))
        alone = torch.cat([network(image) for image in _images(6).split(1)])
        again = network(torch.cat((_images(6)[:1], 50 * _images(3, seed=2))))
    assert whole.std(0).min() > 0
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[0], whole[0], rtol=1e-4, atol=1e-5)


@ALL
def test_dropout_and_batch_statistics_are_off_in_evaluation_mode(name):
    network = _network(name).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    first = network(_images(4))
    assert torch.equal(network(_images(4)), first)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@ALL
def test_convolution_weights_grow_with_the_square_of_the_width(name):
    counts = [_count(_network(name, width), nn.Conv2d) for width in (0.25, 0.5)]
    # Not exactly 4: the first convolution has 3 inputs whatever the width.
    assert counts[1] / counts[0] == pytest.approx(4, rel=0.01)
    channels = [_norm_channels(_network(name, width)) for width in (0.25, 0.5)]
    assert channels[1] == pytest.approx(2 * channels[0], rel=0.01)


@ALL
def test_a_tiny_width_still_works(name):
    assert _network(name, 0.01)(_images(2)).shape == (2, J)


def test_scaled_channels_are_rounded_and_at_least_four():
    assert [scaled(64, width) for width in (1.0, 0.25, 0.3, 0.001, 2.0)] == [64, 16, 19, 4, 128]


def test_half_padding_keeps_the_size():
    for kernel in (1, 3, 5):
        assert conv_norm(3, 4, kernel)(_images(1, 9)).shape == (1, 4, 9, 9)


def test_vgg16_has_the_published_convolutions():
    network = _meta(Vgg16)
    # torchvision's and Keras' VGG-16 without top: 14,714,688 weights and biases, one bias per channel.
    channels = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
    assert _count(network, nn.Conv2d) + channels == 14_714_688
    assert _norm_channels(network) == channels
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 13


def test_resnet50_has_the_published_size():
    network = _meta(ResNet50)
    # 25,557,032 in all with the 7 x 7 stem, which is 3 x 3 here.
    stem = 3 * 64 * (7**2 - 3**2)
    assert sum(value.numel() for value in network.parameters()) + stem == 25_557_032
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 49 + 4


def test_googlenet_has_the_published_size():
    network = _meta(GoogLeNet)
    # The original: 6,998,552 without auxiliary heads, with a 7 x 7 stem, biases and no batch norm.
    stem = 3 * 64 * (7**2 - 3**2)
    biases = _norm_channels(network)
    original = _count(network, nn.Conv2d) + stem + biases + _count(network, nn.Linear)
    assert original == 6_998_552
    assert network.fc.in_features == 1024


@pytest.mark.parametrize(
    ("module", "thousands"), [("3a", 159), ("3b", 380), ("4b", 437), ("5b", 1388)], ids=lambda value: value
)
def test_inception_modules_have_the_sizes_of_table_1(module, thousands):
    # Rows of Szegedy et al. 2015 that follow from their own columns; 4a, 4c, 4d and 5a there do not.
    order = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    inceptions = [layer for layer in _meta(GoogLeNet).features if hasattr(layer, "branches")]
    assert len(inceptions) == len(order)
    count = _count(inceptions[order.index(module)], nn.Conv2d)
    assert count / 1024 == pytest.approx(thousands, rel=0.02)


def test_alexnet_has_five_convolutions_and_three_linear_layers():
    network = _meta(AlexNet)
    channels = (3, 64, 192, 384, 256, 256)
    pairs = itertools.pairwise(channels)
    assert _count(network, nn.Conv2d) == sum(9 * before * after for before, after in pairs)
    linear = [256 * 16 * 1024 + 1024, 1024**2 + 1024, 1024 * 1000 + 1000]
    assert _count(network, nn.Linear) == sum(linear)


def test_resnet50_blocks_start_as_the_identity():
    network = _network("resnet50", 0.1).eval()
    block = network.blocks[1]
    features = torch.rand(2, block.body[0][0].in_channels, 8, 8)
    assert torch.equal(block(features), features)
