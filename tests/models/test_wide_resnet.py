"""Wide residual networks: shapes, sizes and names."""

import pytest
import torch
import torch.nn.functional as F

from acsr_ray.models.wide_resnet import WideResNet, build_wide_resnet


def _images(num_images=2, side=16):
    return torch.rand(num_images, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("depth", "width", "num_classes", "side"),
    [(10, 1, 2, 16), (10, 2, 10, 8), (16, 1, 5, 17), (10, 1, 1, 32)],
)
def test_shapes(depth, width, num_classes, side):
    model = WideResNet(depth, width, num_classes).eval()
    images = _images(side=side)
    assert model.latent_length == 64 * width
    assert model.latent(images).shape == (2, 64 * width)
    assert model(images).shape == (2, num_classes)


def test_logits_are_the_linear_layer_of_the_latent():
    model, images = build_wide_resnet("wrn-10-1", 4).eval(), _images()
    torch.testing.assert_close(model.fc(model.latent(images)), model(images), rtol=0, atol=0)
    assert (model.latent(images) >= 0).all()


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        ("wrn-16-2", 691_674),
        ("wrn-16-4", 2_748_890),
        ("wrn-28-10", 36_479_194),
        ("wrn-34-10", 46_160_474),
        ("wrn-34-10-s4", 46_160_474),
        ("wrn-16-2-gn", 691_674),
    ],
)
def test_number_of_parameters_is_that_of_the_paper(architecture, parameters):
    with torch.device("meta"):
        model = build_wide_resnet(architecture, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("depth", "layers"), [(10, 7), (16, 13), (34, 31)])
def test_depth_counts_the_convolutions(depth, layers):
    with torch.device("meta"):
        model = WideResNet(depth, 1, 10)
    shapes = [module.kernel_size for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert shapes.count((3, 3)) == layers


def test_blocks_add_to_their_input():
    block = build_wide_resnet("wrn-16-1", 3).eval().blocks[1]
    features = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(block(features), features)
    torch.nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(features), features)


def test_images_are_normalised_inside():
    model, images = build_wide_resnet("wrn-10-1", 3).eval(), _images()
    seen = []
    model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    torch.testing.assert_close(seen[0], (images - 0.5) / 0.25)
    assert not {"mean", "std"} & set(model.state_dict())


def test_images_of_a_batch_do_not_mix_in_evaluation_mode():
    model, images = build_wide_resnet("wrn-10-1", 3).eval(), _images(3)
    other = images.clone()
    other[1:] = 0
    torch.testing.assert_close(model.latent(images)[0], model.latent(other)[0])


def test_every_parameter_learns():
    model, images = build_wide_resnet("wrn-10-1", 3).train(), _images(4)
    F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("depth", [4, 3, 9, 11, 15, 32, -2])
def test_bad_depth_is_refused(depth):
    with pytest.raises(ValueError, match="depth must be 6n"):
        WideResNet(depth, 1, 10)


@pytest.mark.parametrize(("width", "num_classes"), [(0, 10), (1, 0), (-1, 10)])
def test_bad_counts_are_refused(width, num_classes):
    with pytest.raises(ValueError, match="must be >= 1"):
        WideResNet(10, width, num_classes)


@pytest.mark.parametrize("name", ["wrn-16", "resnet-18", "wrn-16-4-2", "WRN-16-4", "wrn-16-x", "xwrn-16-4"])
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError, match="architecture must be"):
        build_wide_resnet(name, 10)


@pytest.mark.parametrize(("name", "side", "first"), [("wrn-10-1-s2", 64, 32), ("wrn-10-1-s4-gn", 224, 56)])
def test_a_stride_keeps_large_images_affordable(name, side, first):
    model = build_wide_resnet(name, 3).eval()
    images = _images(side=side)
    assert model.stem(images).shape == (2, 16, first, first)
    assert model.latent(images).shape == (2, 64)


def test_group_norm_knows_no_neighbours():
    model, images = build_wide_resnet("wrn-10-1-gn", 3).train(), _images(4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)
