"""Options of a purifier: what differs from the defaults, strength, and several clusters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from acsr_ray.clustering.gaussians import squared_mahalanobis
from acsr_ray.clustering.selection import Selection
from acsr_ray.purification.bundle import AutoStrength, load_bundle
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.response import response
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.noise import noise_level
from acsr_ray.sparse.tikhonov import tikhonov_split

STEEP = AutoStrength(reference=0.63, slope=10.0, low=0.5, high=1.5)
"""Of the responses of images below some are less than the reference, and some far above it."""


@pytest.fixture(scope="module")
def images(smooth_pixels):
    return torch.from_numpy(smooth_pixels(12, 16, 16, 6)).permute(0, 3, 1, 2).contiguous() / 255


def purify(bundle, images, **options):
    with torch.no_grad():
        return Purifier.load(bundle, options=PurifyOptions(**options)).purify(images)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strength", 0),
        ("strength", -1.0),
        ("strength", float("nan")),
        ("strength", "strong"),
        ("strength", float("inf")),
        ("top_k", 0),
        ("top_k", 1.5),
        ("reconstruction", "none"),
        ("topk", 2),
    ],
)
def test_options_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        PurifyOptions(**{name: value})


@pytest.mark.parametrize("kind", ["tiny", "unrolled", "by response"])
def test_options_spelled_out_are_the_defaults(kind, ways, images):
    config = load_bundle(ways[kind]).config
    own = {"reconstruction": config.reconstruction, "strength": config.strength, "top_k": 1}
    assert own["strength"] == ("auto" if kind == "by response" else 1.0)
    assert torch.equal(purify(ways[kind], images, **own).images, Purifier.load(ways[kind])(images))
    assert Purifier.load(ways[kind]).options == PurifyOptions(**own)
    assert config.changed(PurifyOptions(**own)) == config.changed(PurifyOptions()) == {}


@pytest.fixture(scope="module")
def ways(tiny_bundle, unrolled_bundle, make_unrolled_bundle, tmp_path_factory):
    """Bundles by what they do of themselves."""
    path = make_unrolled_bundle(
        tmp_path_factory.mktemp("ways") / "response", auto_by_response=STEEP, unrolled_strength="auto"
    )
    return {"tiny": tiny_bundle, "unrolled": unrolled_bundle, "by response": path}


@pytest.mark.parametrize(
    ("kind", "options", "changed"),
    [
        ("tiny", {"top_k": 2, "strength": 1}, {"top_k": 2}),
        ("tiny", {"strength": "auto", "top_k": 3}, {"strength": "auto", "top_k": 3}),
        ("unrolled", {"strength": 2, "reconstruction": "unrolled"}, {"strength": 2.0}),
        ("unrolled", {"strength": "auto"}, {"strength": "auto"}),
        ("unrolled", {"reconstruction": "cbpdn"}, {"reconstruction": "cbpdn"}),
        ("by response", {"strength": 1.0}, {"strength": 1.0}),
        ("by response", {"strength": "auto"}, {}),
        # The default of `auto` is the network's.
        ("by response", {"reconstruction": "cbpdn"}, {"reconstruction": "cbpdn"}),
        ("by response", {"reconstruction": "cbpdn", "strength": 1.0}, {"reconstruction": "cbpdn"}),
        (
            "by response",
            {"reconstruction": "cbpdn", "strength": "auto"},
            {"reconstruction": "cbpdn", "strength": "auto"},
        ),
    ],
)
def test_what_differs_from_the_ways_of_a_bundle(kind, options, changed, ways):
    assert load_bundle(ways[kind]).config.changed(PurifyOptions(**options)) == changed


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_strength_scales_lmbda_and_rho_with_it(strength, tiny_bundle, images):
    bundle = load_bundle(tiny_bundle)
    strong = purify(tiny_bundle, images, strength=strength)
    assert bundle.config.cbpdn.rho is None
    config = CbpdnConfig(lmbda=0.1 * strength, iterations=10, rho=50 * 0.1 * strength + 1)
    lowpass, highpass = tikhonov_split(images, bundle.config.tikhonov)
    chosen = Purifier(bundle).select(Purifier(bundle).latents(images)).index
    for row, cluster in enumerate(chosen.tolist()):
        coded = Cbpdn(bundle.atoms[cluster], config).reconstruct(highpass[row : row + 1])
        expected = (lowpass[row] + coded[0]).clamp(0, 1)
        assert (strong.images[row] - expected).abs().max() < 1e-5
    assert (strong.images - purify(tiny_bundle, images).images).abs().max() > 1 / 255


def test_more_strength_leaves_less_detail(tiny_bundle, images):
    lowpass, _ = tikhonov_split(images, load_bundle(tiny_bundle).config.tikhonov)
    detail = [
        (purify(tiny_bundle, images, strength=strength).images - lowpass.clamp(0, 1)).norm().item()
        for strength in (0.25, 1.0, 4.0, 1e5)
    ]
    assert detail[0] > detail[1] > detail[2] > detail[3]
    assert detail[3] < 1e-4


@settings(deadline=None, max_examples=50)
@given(
    reference=st.floats(0.001, 0.1),
    slope=st.floats(0, 5),
    low=st.floats(0.1, 1),
    high=st.floats(1, 5),
)
def test_auto_strength_grows_with_noise_within_bounds(reference, slope, low, high):
    auto = AutoStrength(reference=reference, slope=slope, low=low, high=high)
    level = torch.linspace(0, 0.5, 200, dtype=torch.float64)
    strength = auto.of(level)
    assert (strength.diff() >= 0).all()
    assert strength.min() >= low
    assert strength.max() <= high
    assert auto.of(torch.tensor([reference], dtype=torch.float64)).item() == pytest.approx(1)
    near = torch.tensor([reference * 1.01], dtype=torch.float64)
    assert auto.of(near).item() == pytest.approx(min(high, 1 + 0.01 * slope))


@pytest.mark.parametrize("kind", ["tiny", "unrolled"])
def test_auto_is_the_strength_of_each_images_noise(kind, tiny_bundle, unrolled_bundle, images):
    bundle = {"tiny": tiny_bundle, "unrolled": unrolled_bundle}[kind]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images[:4].shape, generator=generator)
    size = torch.tensor([0.0, 0.01, 0.05, 0.2]).view(-1, 1, 1, 1)
    noisy = (images[:4].mean((2, 3), keepdim=True) + size * noise).clamp(0, 1)
    outcome = purify(bundle, noisy, strength="auto")
    _, highpass = tikhonov_split(noisy, load_bundle(bundle).config.tikhonov)
    strength = AutoStrength().of(noise_level(highpass))
    assert strength[0] == 0.5
    assert 0.5 < strength[1] < 2
    assert strength[3] == 2.0
    assert (strength.diff() >= 0).all()
    for row, factor in enumerate(strength.tolist()):
        alone = purify(bundle, noisy[row : row + 1], strength=factor)
        # A fixed strength of sparse coding scales rho too, so ten iterations end elsewhere.
        close = 1e-5 if kind == "unrolled" else 0.03
        assert (outcome.images[row] - alone.images[0]).abs().max() < close


def test_auto_by_response_is_the_strength_that_the_response_asks_for(ways, images):
    plain = purify(ways["by response"], images, strength=1.0).images
    again = purify(ways["by response"], plain, strength=1.0).images
    factors = STEEP.of(response(images, plain, again))
    assert torch.equal(plain, purify(ways["unrolled"], images).images)
    chosen = purify(ways["by response"], images).images
    # Some images get less than their change, some more, some as much as may be.
    assert factors.min() < 1 < factors.max() == STEEP.high
    for row, factor in enumerate(factors.tolist()):
        alone = purify(ways["by response"], images[row : row + 1], strength=factor).images[0]
        assert (chosen[row] - alone).abs().max() < 1e-5
        # Neighbours change no bit of it.
        assert torch.equal(purify(ways["by response"], images[row : row + 1]).images[0], chosen[row])
    assert (chosen - plain).abs().max() > 1e-3
    # Sparse coding has no use for it.
    coded = [purify(ways[kind], images, strength="auto", reconstruction="cbpdn") for kind in list(ways)[1:]]
    assert torch.equal(coded[0].images, coded[1].images)


@pytest.mark.parametrize("kind", ["thresholds", "filters"])
def test_auto_by_response_asks_the_networks_of_the_same_clusters(
    kind, make_unrolled_bundle, tmp_path, images
):
    auto = AutoStrength(reference=0.58, slope=5.0, low=0.2, high=2.0)
    purifier = Purifier.load(
        make_unrolled_bundle(tmp_path / kind, sharing=kind, auto_by_response=auto, unrolled_strength="auto")
    )
    with torch.no_grad():
        answer = purifier.response(images)
        index = purifier.select(purifier.latents(images)).index
        split = purifier.config.tikhonov
        first = purifier.unrolled(*tikhonov_split(images, split), index).clamp(0, 1)
        second = purifier.unrolled(*tikhonov_split(first, split), index).clamp(0, 1)
        assert index.unique().numel() > 1
        torch.testing.assert_close(answer, response(images, first, second))
        chosen = purifier(images)
        once = Purifier.load(tmp_path / kind, options=PurifyOptions(strength=1.0))(images)
    assert auto.of(answer).unique().numel() > 3
    factor = auto.of(answer).float().view(-1, 1, 1, 1)
    # Where neither was clipped.
    inside = (once > 0) & (once < 1) & (chosen > 0) & (chosen < 1)
    assert inside.float().mean() > 0.5
    expected = images + factor * (once - images)
    torch.testing.assert_close(chosen[inside], expected[inside], rtol=0, atol=1e-5)
    several = Purifier.load(tmp_path / kind, options=PurifyOptions(top_k=3))
    with torch.no_grad():
        whole = several(images)
        assert (whole - chosen).abs().max() > 1e-3
        assert torch.equal(torch.cat([several(part) for part in images.split(5)]), whole)


def test_sparse_coding_has_no_response(tiny_bundle, images):
    with pytest.raises(ValueError, match="only the unrolled"):
        Purifier.load(tiny_bundle).response(images)


def test_auto_by_response_has_a_gradient_that_is_right(ways, images):
    purifier = Purifier.load(ways["by response"])
    leaf = torch.cat([torch.full_like(images[:1], 0.5), images[:1].clamp(0.1, 0.9)]).requires_grad_()
    (gradient,) = torch.autograd.grad(purifier(leaf).square().sum(), leaf)
    assert torch.isfinite(gradient).all()
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-9).view(-1, 1, 1, 1)
    with torch.no_grad():
        ahead, behind = (purifier(leaf + sign * step)[1].square().sum().item() for sign in (1, -1))
    assert (ahead - behind) / 2e-3 == pytest.approx(gradient[1].norm().item(), rel=0.1)


def test_the_bundle_decides_what_auto_is(make_bundle, tmp_path, images):
    make_bundle(tmp_path / "b", auto_strength=AutoStrength(slope=0))
    steady = purify(tmp_path / "b", images, strength="auto")
    assert torch.equal(steady.images, purify(tmp_path / "b", images).images)
    make_bundle(tmp_path / "c", auto_strength=AutoStrength(low=3.0, high=3.0))
    strong = purify(tmp_path / "c", images, strength="auto")
    bundle = load_bundle(tmp_path / "c")
    lowpass, highpass = tikhonov_split(images, bundle.config.tikhonov)
    chosen = Purifier(bundle).select(Purifier(bundle).latents(images)).index
    for row, cluster in enumerate(chosen.tolist()):
        solver = Cbpdn(bundle.atoms[cluster], bundle.config.cbpdn)
        coded = solver.reconstruct(highpass[row : row + 1], torch.tensor([3.0]))[0]
        assert (strong.images[row] - (lowpass[row] + coded).clamp(0, 1)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def sharing(tiny_bundle, make_unrolled_bundle, tmp_path_factory):
    """A bundle for each thing that clusters can have of their own; `cbpdn` has dictionaries."""
    folder = tmp_path_factory.mktemp("sharing")
    built = {name: make_unrolled_bundle(folder / name, name) for name in ("global", "thresholds", "filters")}
    return {"cbpdn": tiny_bundle, **built}


@pytest.mark.parametrize("top_k", [2, 4, 9])
@pytest.mark.parametrize("kind", ["cbpdn", "thresholds", "filters"])
def test_the_nearest_clusters_are_averaged(kind, top_k, sharing, images):
    # Of little contrast, so that nothing is clipped.
    images = 0.35 + 0.3 * images
    purifier = Purifier.load(sharing[kind])
    with torch.no_grad():
        squared = squared_mahalanobis(purifier.latents(images).double(), purifier.gaussians)
        nearest = squared.argsort(1)[:, :top_k]
        alone = [
            purifier.reconstruct(images, Selection(index, torch.zeros(12))).images for index in nearest.T
        ]
    expected = torch.stack(alone).mean(0)
    assert len(alone) == min(top_k, 4)
    outcome = purify(sharing[kind], images, top_k=top_k)
    torch.testing.assert_close(outcome.images, expected, rtol=0, atol=1e-6)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    # What is recorded is the nearest, as without the option.
    plain = purify(sharing[kind], images)
    for field in ("class_id", "cluster_id", "distance"):
        assert torch.equal(getattr(outcome, field), getattr(plain, field)), field
    assert (outcome.images - plain.images).abs().max() > 1e-4


def test_several_clusters_change_nothing_where_all_share_a_network(sharing, images):
    purifier = Purifier.load(sharing["global"])
    assert not purifier.uses_clusters
    assert torch.equal(
        purify(sharing["global"], images, top_k=3).images, purify(sharing["global"], images).images
    )
    for kind in ("cbpdn", "thresholds", "filters"):
        assert Purifier.load(sharing[kind]).uses_clusters


@pytest.mark.parametrize("kind", ["cbpdn", "global", "thresholds", "filters"])
def test_options_together_leave_an_image_alone(kind, sharing, images):
    options = PurifyOptions(strength="auto", top_k=2)
    purifier = Purifier.load(sharing[kind], options=options)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = purifier(images)
        parts = torch.cat([purifier(part) for part in images[order].split(5)])
    assert torch.equal(parts, whole[order])


def test_no_images(sharing):
    for kind in sharing:
        purifier = Purifier.load(sharing[kind], options=PurifyOptions(strength="auto", top_k=3))
        assert purifier(torch.zeros(0, 3, 9, 7)).shape == (0, 3, 9, 7)
