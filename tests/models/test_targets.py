"""Targets: building, saving, loading from each kind of location, and starting from weights."""

import importlib
import json
import sys
import textwrap

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from acsr_ray.artifacts import (
    ArtifactError,
    artifact_digest,
    artifact_kind,
    file_digest,
    finish_artifact,
    save_tensors,
)
from acsr_ray.models.classifier import EncoderConfig, save_classifier
from acsr_ray.models.targets import (
    NETWORKS,
    WEIGHTS,
    Normalized,
    TargetConfig,
    TargetError,
    build_target,
    initialize_weights,
    load_target,
    save_target,
)

NAMES = ("ant", "bee", "cat")
CONFIG = TargetConfig(
    architecture="alexnet",
    num_classes=3,
    width=0.1,
    image_size=16,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)


def _images(count=4, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def _build(config=CONFIG, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_target(config)
    # Running statistics of some data, so that a lost buffer would show.
    model.train()(_images(8, config.image_size, seed=4))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return _build()


@pytest.fixture
def artifact(model, tmp_path):
    save_target(tmp_path / "target", model, CONFIG, NAMES, {"metrics": {"validation_accuracy": 0.5}})
    return tmp_path / "target"


def _flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _check_loaded(target, model, side=16):
    assert not target.model.training
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    images = _images(side=side).requires_grad_(True)
    logits = target.model(images)
    torch.testing.assert_close(logits, model(images))
    gradient = torch.autograd.grad(logits[:, 0].sum(), images)[0]
    assert gradient.abs().max() > 0


# Building


@pytest.mark.parametrize("architecture", NETWORKS)
def test_normalisation_is_inside(architecture):
    config = CONFIG.model_copy(update={"architecture": architecture, "image_size": 32})
    model = _build(config)
    images = _images(side=32)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.mean, config.std))
    torch.testing.assert_close(model(images), model.network((images - mean) / std))
    other = build_target(config.model_copy(update={"mean": (0.0, 0.0, 0.0)})).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other(images), model(images), atol=1e-4)


def test_normalisation_is_per_channel():
    wrapped = Normalized(nn.Identity(), (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    out = wrapped(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(out, torch.tensor([0.9, 0.4, 0.175]))
    assert not wrapped.state_dict()


@pytest.mark.parametrize("name", ["wrn-10-1", "small_cnn"])
def test_networks_with_their_own_normalisation_take_unit_images(name):
    model = build_target(TargetConfig(architecture=name, num_classes=3))
    assert not isinstance(model, Normalized)
    assert model(_images(2, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vgg-16"}, "unknown architecture 'vgg-16', did you mean 'vgg16'"),
        ({"architecture": "zzz"}, "unknown architecture 'zzz'; known: alexnet, vgg16"),
        ({"architecture": "vgg16", "image_size": 31}, "vgg16 with stem_stride 1 .* at least 32 pixels"),
        ({"architecture": "vgg16", "image_size": 62, "stem_stride": 2}, "at least 63 pixels .* got 62"),
        ({"image_size": 9, "stem_stride": 3}, "alexnet with stem_stride 3 .* at least 10 pixels"),
        ({"architecture": "wrn-16"}, "architecture must be wrn-DEPTH-WIDTH.*, got 'wrn-16'"),
        ({"architecture": "wrn-15-2"}, r"depth must be 6n \+ 4"),
        ({"architecture": "wrn-10-1", "width": 0.5}, "wrn-10-1 has no option width"),
        ({"architecture": "wrn-10-1", "stem_stride": 2}, "wrn-10-1 has no option stem_stride"),
        ({"architecture": "small_cnn", "mean": (0.0, 0.0, 0.0)}, "small_cnn has no option mean"),
        ({"architecture": "small_cnn", "image_size": 64}, "small_cnn takes images of 32 pixels"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(TargetError, match=message):
        build_target(TargetConfig(**{"architecture": "alexnet", **change}))


@pytest.mark.parametrize(
    ("architecture", "side", "stem_stride"), [("vgg16", 63, 2), ("vgg16", 32, 1), ("alexnet", 10, 3)]
)
def test_the_smallest_image_is_really_taken(architecture, side, stem_stride):
    config = TargetConfig(architecture=architecture, width=0.1, image_size=side, stem_stride=stem_stride)
    assert build_target(config)(_images(2, side)).shape == (2, 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_classes", 1), ("width", 0.0), ("image_size", 7), ("stem_stride", 0), ("std", (0.2, 0.0, 0.2))],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        TargetConfig(**{field: value})


# Artifacts


def test_round_trip(model, artifact):
    target = load_target(str(artifact))
    _check_loaded(target, model)
    assert target.class_names == NAMES
    assert target.image_size == 16
    assert target.digest == artifact_digest(artifact)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["kind"] == "target"
    assert TargetConfig.from_description(manifest["target"]) == CONFIG
    assert manifest["metrics"] == {"validation_accuracy": 0.5}


def test_changed_bytes_are_refused(artifact):
    _flip_a_byte(artifact / WEIGHTS)
    with pytest.raises(ArtifactError, match="was changed"):
        load_target(str(artifact))


def test_weights_that_do_not_fit_the_description_are_refused(model, tmp_path):
    save_target(tmp_path, model, CONFIG.model_copy(update={"width": 0.2}), NAMES, {})
    with pytest.raises(ArtifactError, match="do not fit"):
        load_target(str(tmp_path))


@pytest.mark.parametrize("kind", ["baseline", "robust"])
def test_encoders_of_the_pipeline_are_targets(kind, tmp_path):
    config = TargetConfig(architecture="wrn-10-1", num_classes=3, image_size=16)
    model = _build(config)
    encoder = EncoderConfig(architecture="wrn-10-1", num_classes=3, image_size=16)
    save_classifier(tmp_path, kind, model, encoder, NAMES, {})
    target = load_target(str(tmp_path))
    _check_loaded(target, model)
    assert (target.class_names, target.image_size) == (NAMES, 16)
    assert target.digest == artifact_digest(tmp_path)
    _flip_a_byte(tmp_path / WEIGHTS)
    with pytest.raises(ArtifactError, match="was changed"):
        load_target(str(tmp_path))


def test_directories_that_are_no_target_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no target at .*manifest\.json is missing"):
        load_target(str(tmp_path))
    finish_artifact(tmp_path, "semantics", [], {})
    with pytest.raises(ArtifactError, match="'semantics' artifact, not a 'target'"):
        load_target(str(tmp_path))


@pytest.mark.parametrize(
    ("manifest", "kind"),
    [
        (b'{"kind": "robust"}', "robust"),
        (b"{}", None),
        (b'{"kind": 3}', None),
        (b"[1]", None),
        (b"\xff{", None),
    ],
)
def test_the_kind_of_an_artifact(tmp_path, manifest, kind):
    assert artifact_kind(tmp_path) is None
    assert artifact_kind(tmp_path / "nothing") is None
    (tmp_path / "manifest.json").write_bytes(manifest)
    assert artifact_kind(tmp_path) == kind


# Files


@pytest.mark.parametrize("prefixed", [True, False])
def test_safetensors_with_and_without_the_prefix(model, tmp_path, prefixed):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, (model if prefixed else model.network).state_dict())
    target = load_target(str(path), config=CONFIG)
    _check_loaded(target, model)
    assert (target.class_names, target.image_size) == ((), 16)
    # Another normalisation is another function of the same bytes.
    other = load_target(str(path), config=CONFIG.model_copy(update={"std": (0.5, 0.5, 0.5)}))
    assert target.digest not in (file_digest(path), other.digest)
    assert target.digest == load_target(str(path), config=CONFIG).digest


def test_safetensors_of_a_network_without_a_prefix_layer(tmp_path):
    config = TargetConfig(architecture="wrn-10-1", num_classes=3, image_size=16)
    model = _build(config)
    save_tensors(tmp_path / "w.safetensors", model.state_dict())
    _check_loaded(load_target(str(tmp_path / "w.safetensors"), config=config), model)


def test_half_precision_weights_are_loaded_as_float32(model, tmp_path):
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_tensors(tmp_path / "w.safetensors", halves)
    loaded = load_target(str(tmp_path / "w.safetensors"), config=CONFIG).model
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(_images()), model(_images()), rtol=0.02, atol=0.02)


def test_torchscript_brings_its_own_normalisation_unless_a_config_says_otherwise(model, tmp_path):
    bare, whole = tmp_path / "bare.pt", tmp_path / "whole.ts"
    torch.jit.trace(model.network, _images()).save(str(bare))
    torch.jit.trace(model, _images()).save(str(whole))
    target = load_target(str(whole))
    _check_loaded(target, model)
    assert (target.class_names, target.image_size) == ((), None)
    assert target.digest != load_target(str(whole), config=CONFIG).digest
    _check_loaded(load_target(str(bare)), model.network)
    normalised = load_target(str(bare), config=CONFIG)
    _check_loaded(normalised, model)
    assert normalised.image_size == 16


def test_a_torchscript_model_saved_in_training_mode_is_switched(tmp_path):
    script = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(12, 3)).train())
    script.save(str(tmp_path / "m.torchscript"))
    loaded = load_target(str(tmp_path / "m.torchscript")).model
    assert torch.equal(loaded(_images(2, 2)), loaded(_images(2, 2)))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nothing", "neither a directory of train_target, nor package.module:factory, nor"),
        ("nothing.onnx", "neither a directory"),
        ("nothing.pt", "the file does not exist"),
        ("nothing.safetensors", "the file does not exist"),
    ],
)
def test_locations_without_a_target_are_refused(location, message):
    with pytest.raises(TargetError, match=f"no target '{location}'.*{message}"):
        load_target(location, config=CONFIG)


def test_unreadable_files_are_refused(model, tmp_path):
    weights, state, text = tmp_path / "w.safetensors", tmp_path / "s.pt", tmp_path / "t.ts"
    save_tensors(weights, model.state_dict())
    with pytest.raises(TargetError, match="needs its architecture"):
        load_target(str(weights))
    with pytest.raises(ArtifactError, match="do not fit"):
        load_target(str(weights), config=CONFIG.model_copy(update={"num_classes": 4}))
    weights.write_text("nonsense")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_target(str(weights), config=CONFIG)
    torch.save(model.state_dict(), state)
    text.write_text("nonsense")
    for path in (state, text):
        with pytest.raises(TargetError, match=r"not a readable TorchScript file \(a state dict belongs in"):
            load_target(str(path))


# Factories


FACTORY = """
    import torch
    from torch import nn

    VALUE = 1.0
    NUMBER = 3

    class Mean(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 3), value))
            self.register_buffer("shift", torch.zeros(()), persistent=False)
            self.drop = nn.Dropout(0.9)

        def forward(self, images):
            return self.drop(images.mean((2, 3)) @ self.weight.T.float() + self.shift)

    def make():
        return Mean(VALUE)

    def other():
        return Mean(VALUE)

    class Scaled(Mean):
        # A normalisation that no tensor holds.
        def forward(self, images):
            return super().forward(images * NUMBER)

    def scaled():
        return Scaled(VALUE)

    def half():
        return Mean(VALUE).bfloat16()

    def text():
        return "model"

    def broken():
        raise RuntimeError("no such checkpoint")
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories_of_test_targets.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.syspath_prepend(tmp_path)
    yield "factories_of_test_targets"
    sys.modules.pop("factories_of_test_targets", None)


def test_factory(factories):
    target = load_target(f"{factories}:make")
    assert not target.model.training
    assert not target.model.weight.requires_grad
    assert (target.class_names, target.image_size) == ((), None)
    images = _images()
    expected = images.sum(1, keepdim=True).mean((2, 3)).expand(-1, 2)
    torch.testing.assert_close(target.model(images), expected)


def test_factory_digest_follows_what_it_computes(factories, monkeypatch):
    first = load_target(f"{factories}:make").digest
    assert load_target(f"{factories}:make").digest == first
    assert load_target(f"{factories}:other").digest != first
    assert load_target(f"{factories}:half").digest != first
    module = importlib.import_module(factories)
    monkeypatch.setattr(module, "VALUE", 1.5)
    assert load_target(f"{factories}:make").digest != first
    monkeypatch.setattr(module, "VALUE", 1.0)
    assert load_target(f"{factories}:make").digest == first

    def shifted():
        model = module.other()
        model.shift += 1
        return model

    monkeypatch.setattr(module, "make", shifted)
    assert load_target(f"{factories}:make").digest != first


def test_factory_digest_follows_what_only_code_says(factories, monkeypatch):
    first = load_target(f"{factories}:scaled").digest
    assert load_target(f"{factories}:scaled").digest == first
    monkeypatch.setattr(importlib.import_module(factories), "NUMBER", 2)
    assert load_target(f"{factories}:scaled").digest != first


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("no.such.package:make", "cannot import target 'no.such.package:make': No module named 'no'"),
        ("{}:nothing", "has no attribute 'nothing'"),
        ("{}:", "cannot import"),
        (":make", "cannot import target ':make'"),
        (".relative:make", "cannot import target"),
        ("{}:NUMBER", "is a int, not a function"),
        ("{}:text", "returned str, not a torch.nn.Module"),
    ],
)
def test_factories_that_cannot_be_used_are_refused(factories, location, message):
    with pytest.raises(TargetError, match=message):
        load_target(location.format(factories))


def test_an_error_inside_a_factory_is_its_own(factories):
    with pytest.raises(RuntimeError, match="no such checkpoint"):
        load_target(f"{factories}:broken")


# Starting from weights


@pytest.mark.parametrize("architecture", [*NETWORKS, "wrn-10-1", "small_cnn"])
def test_all_weights_are_taken_over(architecture):
    plain = architecture not in NETWORKS
    config = TargetConfig(architecture=architecture, num_classes=3, width=1.0 if plain else 0.1)
    source, model = _build(config), build_target(config).eval()
    assert initialize_weights(model, source.state_dict()) == []
    images = _images(2, 32)
    assert torch.equal(model(images), source(images))


@pytest.mark.parametrize("architecture", [*NETWORKS, "wrn-10-1", "small_cnn"])
def test_only_the_class_layer_is_fresh_for_other_classes(architecture):
    plain = architecture not in NETWORKS
    config = TargetConfig(architecture=architecture, num_classes=7, width=1.0 if plain else 0.1)
    source = _build(config).state_dict()
    model = build_target(config.model_copy(update={"num_classes": 3}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix = "" if plain else "network."
    fresh = [f"{prefix}fc.bias", f"{prefix}fc.weight"]
    assert initialize_weights(model, source) == fresh
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in fresh else source[name]), name


def test_weights_without_a_class_layer_are_a_trunk(model):
    trunk = {name: tensor for name, tensor in model.state_dict().items() if ".fc." not in name}
    assert initialize_weights(_build(seed=1), trunk) == ["network.fc.bias", "network.fc.weight"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 0.2}, r"network\.classifier\.1\.bias"),
        ({"architecture": "vgg16", "image_size": 32}, r"network\.classifier\.1\.bias"),
    ],
)
def test_weights_of_another_network_are_refused_and_change_nothing(change, named):
    weights = _build(CONFIG.model_copy(update=change)).state_dict()
    model = build_target(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TargetError, match=f"another architecture or width; first differences: {named}"):
        initialize_weights(model, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tensors_without_a_place_are_refused(model):
    weights = {**model.state_dict(), "network.extra.weight": torch.ones(1)}
    with pytest.raises(TargetError, match=r"network\.extra\.weight"):
        initialize_weights(build_target(CONFIG), weights)
