"""The registry: every defence keeps the contract; settings that cannot work are refused with a hint."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from acsr_ray.artifacts import ArtifactError
from acsr_ray.config import ConfigError
from acsr_ray.defenses.quilting import PatchBankConfig, collect_patches, save_patch_bank
from acsr_ray.evaluation.defense_registry import DEFENSES, with_lmbda
from acsr_ray.evaluation.defenses import DefenseConfig, build_defense, defense_digest, defense_label
from acsr_ray.models.autoencoder import Autoencoder, AutoencoderConfig, save_autoencoder
from acsr_ray.models.pixel_cnn import PixelCnn, PixelCnnConfig, save_pixel_cnn
from acsr_ray.purification.bundle import load_bundle
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.tikhonov import TikhonovConfig
from acsr_ray.training.global_dictionary import GlobalDictionary, save_global_dictionary

REQUIRED = {"rank": {"rank": 2}, "cluster": {"cluster": 1}}
RANDOMIZED = {
    "shield",
    "tvm_dropout",
    "quilting",
    "crop_ensemble",
    "pixel_deflection",
    "random_cluster",
}
DIFFERENTIABLE = {
    "none",
    "gaussian",
    "crop_ensemble",
    "magnet",
    "stl",
    "acsr",
    "random_atoms",
    "dct_atoms",
    "random_cluster",
    "rank",
    "cluster",
    "low_band",
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, tiny_bundle, smooth_pixels):
    """Return a directory for every kind of artifact, small and untrained."""
    root = tmp_path_factory.mktemp("artifacts")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = AutoencoderConfig(width=4, hidden=1)
        save_autoencoder(root / "magnet", Autoencoder(shape), shape, {})
        save_pixel_cnn(root / "pixel_cnn", PixelCnn(PixelCnnConfig(radius=1, width=8, mixtures=2)), {})
    bundle = load_bundle(tiny_bundle)
    learnt = GlobalDictionary(bundle.atoms[0], bundle.config.cbpdn, TikhonovConfig())
    save_global_dictionary(root / "global_dictionary", learnt, {})
    patches = collect_patches(smooth_pixels(4, 16, 16, 0), PatchBankConfig(count=50), 0)
    save_patch_bank(root / "patch_bank", patches, {})
    return {path.name: str(path) for path in root.iterdir()} | {"bundle": str(tiny_bundle)}


@pytest.fixture(scope="module")
def config_of(artifacts):
    """Return settings of a defence by name, with the artifact that it needs."""

    def make(name, **parameters):
        kind = DEFENSES[name].artifact
        artifact = artifacts[kind] if kind else None
        return DefenseConfig(name=name, artifact=artifact, **{**REQUIRED.get(name, {}), **parameters})

    return make


@pytest.fixture(scope="module")
def built(config_of):
    return {name: build_defense(config_of(name)) for name in DEFENSES}


@pytest.fixture(scope="module")
def images(smooth_pixels):
    return torch.from_numpy(smooth_pixels(5, 16, 16, 3)).permute(0, 3, 1, 2).contiguous() / 255


@pytest.mark.parametrize("name", DEFENSES)
def test_shape_range_and_dtype(name, built, images):
    for batch in (images, images[:2].double(), images[:0], images[:1, :, :9, :12], torch.ones(1, 3, 8, 8)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            defended = built[name](batch)
        assert (defended.shape, defended.dtype) == (batch.shape, batch.dtype)
        assert torch.isfinite(defended).all()
        if len(batch):
            assert defended.min() >= 0
            assert defended.max() <= 1


@pytest.mark.parametrize("name", DEFENSES)
def test_an_image_does_not_see_its_batch(name, built, images):
    whole = built[name](images)
    assert torch.equal(whole.flip(0), built[name](images.flip(0)))
    assert torch.equal(whole[1:4], built[name](images[1:4]))
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(whole, built[name](strided))


@pytest.mark.parametrize("name", DEFENSES)
def test_bad_images_are_refused(name, built):
    with pytest.raises(ValueError, match="images must be"):
        built[name](torch.full((1, 3, 8, 8), 1.5))


@pytest.mark.parametrize("name", DEFENSES)
def test_randomness_is_as_announced(name, built, images):
    def classify(x):
        return x.flatten(1)[:, ::7]

    defense = built[name]
    assert defense.randomized == (name in RANDOMIZED) == DEFENSES[name].randomized
    others = [defense.with_seed(seed).logits(classify, images) for seed in (1, 2, 3)]
    own = defense.logits(classify, images)
    assert torch.equal(own, defense.logits(classify, images))
    assert any(not torch.equal(own, other) for other in others) == defense.randomized


@pytest.mark.parametrize("name", DEFENSES)
def test_gradients_are_as_announced(name, built, images):
    assert built[name].differentiable == (name in DIFFERENTIABLE)
    x = (images[:2] * 0.9 + 0.05).requires_grad_()
    defended = built[name](x)
    if not built[name].differentiable:
        assert not defended.requires_grad
        return
    (gradient,) = torch.autograd.grad(defended.square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert gradient.flatten(1).norm(dim=1).min() > 0


CODED = {"acsr", "cluster", "random_cluster", "rank", "random_atoms", "dct_atoms", "stl"}


def _exact(defense):
    """Return a copy whose sparse coding ends at the optimum, to which its derivative belongs."""
    defense = copy.deepcopy(defense)
    owner = getattr(defense, "purifier", defense)
    if hasattr(owner, "solver"):
        config = owner.solver.config.model_copy(update={"tolerance": 1e-5, "rounds": 200})
        owner.solver = Cbpdn(owner.solver.atoms, config)
    return defense


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE - {"none", "gaussian", "crop_ensemble"}))
def test_gradient_along_a_direction_by_differences(name, built, images):
    # Away from 0 and 1, where clipping has a kink; float32, so the step is not tiny.
    x = images[1:2] * 0.5 + 0.25
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    # The seed's draws follow the 8-bit image; a fixed cluster takes them out of the comparison.
    defense = _exact(built["cluster" if name == "random_cluster" else name])
    step = 2e-4
    with torch.no_grad():
        ahead, behind = (defense(x + sign * step * direction) for sign in (1, -1))
    slope = ((ahead - behind) * weight).double().sum().item() / (2 * step)
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((defense(start) * weight).sum(), start)
    # The slope along a random direction is of the size of the gradient's norm, which sets the tolerance.
    # Sparse codes have kinks, and the step crosses some.
    tolerance = (0.05 if name in CODED else 0.02) * gradient.norm().item()
    assert (gradient * direction).sum().item() == pytest.approx(slope, abs=tolerance)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(2, 24), width=st.integers(2, 24))
def test_transforms_take_any_size(built, height, width):
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
    for name in DEFENSES:
        if DEFENSES[name].artifact is None:
            assert built[name](images).shape == images.shape, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "jpg"}, "unknown defence 'jpg', did you mean 'jpeg'"),
        ({"name": "jpeg", "qualty": 50}, "unknown key 'qualty', did you mean 'quality'"),
        (
            {"name": "jpeg", "sigma": 1.0},
            "jpeg has no sigma: it takes quality, subsampling; sigma is of gaus",
        ),
        ({"name": "shield", "quality": 50}, "it takes no parameters; quality is of jpeg"),
        ({"name": "acsr", "artifact": "x", "rank": 1}, "rank is of rank"),
        ({"name": "rank", "artifact": "x"}, "rank needs rank"),
        ({"name": "jpeg", "artifact": "x"}, "jpeg needs no artifact"),
        ({"name": "jpeg", "quality": 0}, "quality"),
        ({"name": "jpeg", "subsampling": "4:1:1"}, "subsampling"),
        ({}, "name"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValidationError, match=message):
        DefenseConfig.model_validate(values)


@pytest.mark.parametrize("name", [name for name in DEFENSES if DEFENSES[name].artifact])
def test_missing_artifacts_are_named_with_the_command(name, tmp_path):
    kind = DEFENSES[name].artifact
    maker = "build_bundle" if kind == "bundle" else f"train_defense.py --kind {kind} --train"
    with pytest.raises(ArtifactError, match=f"{name} needs artifact.*{maker}"):
        build_defense(DefenseConfig(name=name, **REQUIRED.get(name, {})))
    for place in (tmp_path / "nowhere", tmp_path):
        config = DefenseConfig(name=name, artifact=str(place), **REQUIRED.get(name, {}))
        for use in (build_defense, defense_digest):
            with pytest.raises(ArtifactError, match=str(place)):
                use(config)


def test_an_artifact_of_another_kind(artifacts):
    with pytest.raises(ArtifactError, match="is a 'pixel_cnn' artifact, not a 'magnet'"):
        build_defense(DefenseConfig(name="magnet", artifact=artifacts["pixel_cnn"]))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("rank", {"rank": 5}, r"rank must be in 1\.\.4"),
        ("cluster", {"cluster": 4}, r"cluster must be in 0\.\.3"),
        ("quilting", {"neighbours": 51}, r"neighbours must be in 1\.\.50"),
        ("quilting", {"overlap": 5}, r"overlap must be in 0\.\.4"),
    ],
)
def test_parameters_that_do_not_fit_the_artifact(name, parameters, message, config_of):
    with pytest.raises(ConfigError, match=f"{name}: {message}"):
        build_defense(config_of(name, **parameters))


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({"name": "none"}, "No defense"),
        ({"name": "jpeg"}, "JPEG 75"),
        ({"name": "jpeg", "quality": 20, "subsampling": "4:4:4"}, "JPEG 20 subsampling 4:4:4"),
        ({"name": "gaussian", "sigma": 1.0}, "Gaussian 1"),
        ({"name": "pixel_defend", "artifact": "x"}, "PixelDefend 16/255"),
        ({"name": "pixel_defend", "artifact": "x", "epsilon": 0.05}, "PixelDefend 0.05"),
        ({"name": "acsr", "artifact": "x"}, "ACSR"),
        ({"name": "acsr", "artifact": "x", "lmbda": 0.1, "reselect": 1}, "ACSR lambda 0.1 reselect 1"),
        ({"name": "rank", "artifact": "x", "rank": 3, "lmbda": 0.2}, "Cluster of rank 3 lambda 0.2"),
        (
            {"name": "acsr", "artifact": "x", "reconstruction": "unrolled", "strength": "auto"},
            "ACSR reconstruction unrolled strength auto",
        ),
        ({"name": "acsr", "artifact": "x", "strength": 1.5, "top_k": 3}, "ACSR strength 1.5 top_k 3"),
        ({"name": "acsr", "artifact": "x", "strength": 1.0, "top_k": 1}, "ACSR strength 1"),
        ({"name": "crop_ensemble", "crop": 0.8, "crops": 10}, "Crop ensemble 0.8 crops 10"),
    ],
)
def test_labels(values, label):
    assert defense_label(DefenseConfig.model_validate(values)) == label


def test_digest_holds_what_decides_the_pixels(config_of, artifacts, tmp_path):
    plain = json.loads(defense_digest(config_of("acsr")))
    assert plain["algorithm_version"]
    assert len(plain["artifact"]) == 64
    assert artifacts["bundle"] not in defense_digest(config_of("acsr"))
    # A default spelled out is the same defence; another strength, seed or artifact is not.
    assert defense_digest(config_of("jpeg")) == defense_digest(config_of("jpeg", quality=75))
    digests = {
        defense_digest(config)
        for config in (
            config_of("acsr"),
            config_of("acsr", lmbda=0.3),
            config_of("acsr", seed=1),
            config_of("random_cluster"),
            DefenseConfig(name="acsr", artifact="cifar10-small"),
        )
    }
    assert len(digests) == 5


def test_options_at_their_defaults_leave_a_digest_as_it_was(config_of):
    plain = defense_digest(config_of("acsr"))
    # What it was before there were options, so that cells measured then are found again.
    assert json.loads(plain)["parameters"] == {"lmbda": None, "reselect": 0}
    assert defense_digest(config_of("acsr", strength=1.0, top_k=1)) == plain
    assert defense_digest(config_of("acsr", strength=1)) == plain
    assert defense_digest(config_of("acsr", reconstruction="cbpdn")) == plain
    changes = ({}, {"strength": 2.0}, {"strength": "auto"}, {"top_k": 2}, {"top_k": 2, "strength": 2.0})
    assert len({defense_digest(config_of("acsr", **given)) for given in changes}) == len(changes)
    for name in ("rank", "cluster", "random_cluster", "low_band"):
        parameters = json.loads(defense_digest(config_of(name)))["parameters"]
        assert not parameters.keys() & {"strength", "top_k", "reconstruction"}


def test_a_bundles_own_reconstruction_by_name_is_the_same_defence(make_unrolled_bundle, tmp_path):
    def digest(bundle, **given):
        return defense_digest(DefenseConfig(name="acsr", artifact=str(bundle), **given))

    # The same files, which purify otherwise where no reconstruction is named.
    learnt, paper = (
        make_unrolled_bundle(tmp_path / name, reconstruction=name) for name in ("unrolled", "cbpdn")
    )
    assert digest(learnt) != digest(paper)
    for bundle, own, other in ((learnt, "unrolled", "cbpdn"), (paper, "cbpdn", "unrolled")):
        assert digest(bundle, reconstruction=own, top_k=2) == digest(bundle, top_k=2)
        assert digest(bundle, reconstruction=other) != digest(bundle, reconstruction=own) == digest(bundle)


@pytest.mark.parametrize("name", ["rank", "cluster", "random_cluster", "low_band", "jpeg"])
@pytest.mark.parametrize("option", [{"strength": 2.0}, {"top_k": 2}, {"reconstruction": "cbpdn"}])
def test_options_of_a_purifier_are_of_acsr_alone(name, option, config_of):
    with pytest.raises(ValidationError, match=f"{name} has no {next(iter(option))}"):
        config_of(name, **option)


@pytest.mark.parametrize(
    "option", [{"strength": 0.0}, {"strength": "weak"}, {"top_k": 0}, {"reconstruction": "none"}]
)
def test_options_out_of_range(option, config_of):
    with pytest.raises(ValidationError, match=next(iter(option))):
        config_of("acsr", **option)


def test_settings_survive_json(config_of):
    for name in DEFENSES:
        config = config_of(name)
        assert DefenseConfig.from_description(json.loads(json.dumps(config.describe()))) == config


@pytest.mark.parametrize("name", ["jpeg", "gaussian", "tvm", "median", "pixel_defend", "acsr", "stl"])
def test_strengths_reach_the_defense(name, config_of, images):
    weak, strong = {
        "jpeg": ({"quality": 95}, {"quality": 10}),
        "gaussian": ({"sigma": 0.3}, {"sigma": 2.0}),
        "tvm": ({"weight": 0.01}, {"weight": 0.5}),
        "median": ({"size": 3}, {"size": 7}),
        "pixel_defend": ({"epsilon": 1 / 255}, {"epsilon": 20 / 255}),
        "acsr": ({"lmbda": 0.001}, {"lmbda": 1.0}),
        "stl": ({"lmbda": 0.001}, {"lmbda": 1.0}),
    }[name]
    change = [(build_defense(config_of(name, **given))(images) - images).norm() for given in (weak, strong)]
    assert change[0] < change[1]


def test_strength_of_sparse_coding_scales_the_penalty():
    config = CbpdnConfig(lmbda=0.1, iterations=30, rho=4.0)
    assert with_lmbda(config, None) is config
    assert with_lmbda(config, 0.1) is config
    stronger = with_lmbda(config, 0.3)
    assert (stronger.lmbda, stronger.iterations) == (0.3, 30)
    assert stronger.penalty == pytest.approx(4.0 * 16 / 6)
    assert with_lmbda(CbpdnConfig(), 0.3).penalty == pytest.approx(16)


@pytest.fixture(scope="module")
def learnt(make_unrolled_bundle, tmp_path_factory):
    """A bundle whose clusters have filters of their own in a trained network, its default."""
    return str(make_unrolled_bundle(tmp_path_factory.mktemp("bundle") / "learnt", "filters"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reconstruction": "unrolled", "strength": "auto"},
        {"reconstruction": "cbpdn", "top_k": 3},
        {"strength": 2.5, "top_k": 2},
    ],
)
def test_acsr_with_options_is_the_purifier_with_them(options, learnt, images):
    defense = build_defense(DefenseConfig(name="acsr", artifact=learnt, **options))
    expected = Purifier.load(learnt, options=PurifyOptions(**options))(images)
    assert torch.equal(defense(images), expected)
    assert torch.equal(defense(images[1:3]), expected[1:3])


def test_strength_and_lmbda_of_acsr_multiply(config_of, images):
    both = build_defense(config_of("acsr", lmbda=0.2, strength=1.5))(images)
    bundle = load_bundle(config_of("acsr").artifact)
    cbpdn = with_lmbda(bundle.config.cbpdn, 0.2)
    scaled = bundle.config.model_copy(update={"cbpdn": cbpdn})
    purifier = Purifier(replace(bundle, config=scaled), options=PurifyOptions(strength=1.5))
    assert torch.equal(both, purifier(images))
    assert not torch.equal(both, build_defense(config_of("acsr", lmbda=0.2))(images))


@pytest.mark.parametrize(
    "name", ["rank", "cluster", "random_cluster", "low_band", "dct_atoms", "random_atoms"]
)
def test_what_asks_about_clusters_codes_sparsely_in_any_bundle(name, learnt, config_of, images):
    plain = config_of(name)
    other = plain.model_copy(update={"artifact": learnt})
    assert torch.equal(build_defense(other)(images), build_defense(plain)(images))


def test_acsr_follows_the_default_of_its_bundle(learnt, config_of, images):
    default, paper, unrolled = (
        build_defense(DefenseConfig(name="acsr", artifact=learnt, **given))(images)
        for given in ({}, {"reconstruction": "cbpdn"}, {"reconstruction": "unrolled"})
    )
    assert torch.equal(default, unrolled)
    assert torch.equal(paper, build_defense(config_of("acsr"))(images))
    assert not torch.equal(default, paper)


def test_a_network_that_a_bundle_does_not_have(config_of):
    with pytest.raises(ArtifactError, match="no unrolled reconstruction"):
        build_defense(config_of("acsr", reconstruction="unrolled"))


@pytest.mark.parametrize("given", [{}, {"reconstruction": "unrolled"}])
def test_a_network_has_no_lmbda(given, learnt):
    config = DefenseConfig(name="acsr", artifact=learnt, lmbda=0.3, **given)
    with pytest.raises(ConfigError, match=r"acsr: lmbda .* strength"):
        build_defense(config)
    build_defense(config.model_copy(update={"reconstruction": "cbpdn"}))


@pytest.mark.parametrize("given", [{}, {"reconstruction": "unrolled"}])
def test_a_network_that_all_clusters_share_has_no_cluster_to_choose_anew(given, unrolled_bundle, learnt):
    config = DefenseConfig(name="acsr", artifact=str(unrolled_bundle), reselect=1, **given)
    with pytest.raises(ConfigError, match="acsr: reselect does nothing"):
        build_defense(config)
    changes = ({"reselect": 0}, {"reconstruction": "cbpdn"}, {"artifact": learnt})
    for change in changes:
        build_defense(config.model_copy(update=change))


def test_gradients_reach_the_image_through_a_network(learnt, images):
    defense = build_defense(DefenseConfig(name="acsr", artifact=learnt, strength="auto", top_k=2))
    assert defense.differentiable
    x = (images[:2] * 0.9 + 0.05).requires_grad_()
    (gradient,) = torch.autograd.grad(defense(x).square().sum(), x)
    assert torch.isfinite(gradient).all()
    assert gradient.flatten(1).norm(dim=1).min() > 0
