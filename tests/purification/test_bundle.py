"""Bundles: what is saved is loaded, what was changed is refused, and a name finds its directory."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from acsr_ray.artifacts import ArtifactError, load_artifact
from acsr_ray.purification.bundle import (
    ALIASES,
    CLUSTERS,
    DICTIONARIES,
    ENCODER,
    RECONSTRUCTION,
    AutoStrength,
    Bundle,
    BundleConfig,
    bundle_digest,
    find_bundle,
    load_bundle,
    save_bundle,
)
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.tikhonov import TikhonovConfig


@pytest.fixture
def copied(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


@pytest.mark.parametrize("kind", ["tiny", "unrolled"])
def test_round_trip(kind, tiny_bundle, unrolled_bundle, tmp_path):
    saved = {"tiny": tiny_bundle, "unrolled": unrolled_bundle}[kind]
    bundle = load_bundle(saved)
    save_bundle(tmp_path / "again", bundle, {"origin": "tests"})
    again = load_bundle(tmp_path / "again")
    assert again.config == bundle.config
    assert again.encoder.keys() == bundle.encoder.keys()
    for name, tensor in bundle.encoder.items():
        assert torch.equal(again.encoder[name], tensor), name
    assert torch.equal(again.atoms, bundle.atoms)
    for name, tensor in vars(bundle.gaussians).items():
        assert torch.equal(getattr(again.gaussians, name), tensor), name
    assert bool(bundle.reconstruction) == (kind == "unrolled")
    assert again.reconstruction.keys() == bundle.reconstruction.keys()
    for name, tensor in bundle.reconstruction.items():
        assert torch.equal(again.reconstruction[name], tensor), name
    assert bundle_digest(tmp_path / "again") == bundle_digest(saved)


def test_float64_arrays_survive_up_to_float32(tiny_bundle, tmp_path):
    bundle = load_bundle(tiny_bundle)
    generator = torch.Generator().manual_seed(0)
    triangle = torch.randn(4, 64, 64, dtype=torch.float64, generator=generator).tril()
    mean = torch.randn(4, 64, dtype=torch.float64, generator=generator)
    gaussians = replace(bundle.gaussians, whitening=triangle, mean=mean)
    save_bundle(tmp_path / "wide", replace(bundle, gaussians=gaussians, atoms=bundle.atoms.double()), {})
    loaded = load_bundle(tmp_path / "wide")
    assert torch.equal(loaded.gaussians.whitening, triangle.float())
    assert torch.equal(loaded.gaussians.mean, mean.float())
    assert loaded.atoms.dtype == torch.float32


def test_settings_are_in_the_manifest(make_bundle, tmp_path):
    make_bundle(
        tmp_path / "b",
        selection="gaussian_loglik",
        tikhonov=TikhonovConfig(lmbda=2.5),
        cbpdn=CbpdnConfig(lmbda=0.3, iterations=4, rho=2.0),
    )
    config = load_bundle(tmp_path / "b").config
    assert config.selection == "gaussian_loglik"
    assert config.tikhonov.lmbda == 2.5
    assert config.cbpdn == CbpdnConfig(lmbda=0.3, iterations=4, rho=2.0)
    manifest = load_artifact(tmp_path / "b", "bundle")
    assert manifest["origin"] == "tests"
    assert manifest["bundle"]["class_names"] == ["ant", "bee", "cat"]


def test_digest_follows_the_settings(make_bundle, tiny_bundle, tmp_path):
    make_bundle(tmp_path / "same")
    make_bundle(tmp_path / "other", cbpdn=CbpdnConfig(iterations=11))
    assert bundle_digest(tmp_path / "same") == bundle_digest(tiny_bundle)
    assert bundle_digest(tmp_path / "other") != bundle_digest(tiny_bundle)


@pytest.mark.parametrize("name", [ENCODER, CLUSTERS, DICTIONARIES])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
def test_tampering_is_refused(copied, name, where):
    data = bytearray((copied / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="was changed"):
        load_bundle(copied)


@pytest.mark.parametrize("name", [ENCODER, CLUSTERS, DICTIONARIES, "manifest.json"])
def test_missing_files_are_refused(copied, name):
    (copied / name).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load_bundle(copied)


def test_other_artifacts_are_refused(copied):
    path = copied / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "robust"}))
    with pytest.raises(ArtifactError, match="'robust' artifact"):
        load_bundle(copied)


def test_find_by_directory_and_by_packaged_name(tiny_bundle, tmp_path, monkeypatch):
    assert find_bundle(tiny_bundle) == tiny_bundle.resolve()
    assert find_bundle(str(tiny_bundle)) == tiny_bundle.resolve()
    package = tmp_path / "package"
    shutil.copytree(tiny_bundle, package / "bundles" / "small")
    (package / "bundles" / "half-written").mkdir()
    monkeypatch.setattr("acsr_ray.purification.bundle.files", lambda _: package)
    assert load_bundle("small").config.name == "tiny"
    with pytest.raises(ArtifactError, match=r"packaged are small$"):
        find_bundle("half-written")


def test_aliases_name_the_packaged_bundles():
    assert find_bundle("cifar10") == find_bundle("cifar10-small")
    for alias, name in ALIASES.items():
        assert load_bundle(alias).config == load_bundle(name).config


def test_half_precision_halves_the_weights_and_keeps_the_selection(tiny_bundle, tmp_path):
    bundle = load_bundle(tiny_bundle)
    save_bundle(tmp_path / "half", bundle, {}, half=True)
    half = load_bundle(tmp_path / "half")
    for name in ("encoder", "clusters"):
        sizes = [
            (folder / f"{name}.safetensors").stat().st_size for folder in (tiny_bundle, tmp_path / "half")
        ]
        assert sizes[1] < 0.65 * sizes[0]
    assert half.gaussians.whitening.dtype == torch.float32
    torch.testing.assert_close(half.gaussians.whitening, bundle.gaussians.whitening, rtol=1e-3, atol=1e-6)
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    whole, rounded = (Purifier(loaded).purify(images) for loaded in (bundle, half))
    assert (whole.cluster_id == rounded.cluster_id).float().mean() > 0.9
    torch.testing.assert_close(rounded.distance, whole.distance, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["no-such-bundle", "/nowhere/at/all", "../bundles"])
def test_unknown_bundles_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="no bundle"):
        Purifier.load(name)


@pytest.mark.parametrize("shape", [(3, 8, 3, 5, 5), (4, 8, 1, 5, 5), (4, 8, 3, 5), (8, 3, 5, 5)])
def test_dictionaries_must_fit_the_clusters(tiny_bundle, shape):
    bundle = load_bundle(tiny_bundle)
    with pytest.raises(ArtifactError, match="dictionaries must be"):
        replace(bundle, atoms=torch.zeros(shape))


def test_whitening_must_fit_the_means(tiny_bundle):
    bundle = load_bundle(tiny_bundle)
    with pytest.raises(ArtifactError, match="whitening must be"):
        replace(bundle, gaussians=replace(bundle.gaussians, whitening=torch.zeros(4, 63, 63)))


def test_weights_must_fit_the_architecture(tiny_bundle):
    bundle = load_bundle(tiny_bundle)
    wider = bundle.config.encoder.model_copy(update={"architecture": "wrn-10-2"})
    config = bundle.config.model_copy(update={"encoder": wider})
    with pytest.raises(ArtifactError, match="do not fit wrn-10-2"):
        Purifier(Bundle(config, bundle.encoder, bundle.gaussians, bundle.atoms))


def test_a_bundle_needs_classes(tiny_bundle):
    fields = load_bundle(tiny_bundle).config.describe()
    with pytest.raises(ValidationError, match="class_names"):
        BundleConfig.from_description({**fields, "class_names": []})


def test_a_manifest_must_vouch_for_every_file(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["encoder.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"encoder\.safetensors"):
        load_bundle(copied)


def test_a_manifest_without_settings_is_refused(copied):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["bundle"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="settings"):
        load_bundle(copied)


@pytest.fixture
def learnt(unrolled_bundle, tmp_path):
    return shutil.copytree(unrolled_bundle, tmp_path / "learnt")


def test_a_bundle_without_a_network_has_no_file_for_it(tiny_bundle, unrolled_bundle):
    assert not (tiny_bundle / RECONSTRUCTION).exists()
    assert RECONSTRUCTION in load_artifact(unrolled_bundle, "bundle")["files"]


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_network_that_was_changed_is_refused(learnt, where):
    data = bytearray((learnt / RECONSTRUCTION).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (learnt / RECONSTRUCTION).write_bytes(data)
    with pytest.raises(ArtifactError, match="was changed"):
        load_bundle(learnt)


def test_a_network_that_is_missing_is_refused(learnt):
    (learnt / RECONSTRUCTION).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load_bundle(learnt)


def test_a_network_that_the_manifest_does_not_vouch_for_is_refused(learnt):
    path = learnt / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][RECONSTRUCTION]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"reconstruction\.safetensors"):
        load_bundle(learnt)


def test_settings_and_weights_of_a_network_belong_together(tiny_bundle, unrolled_bundle):
    plain, unrolled = load_bundle(tiny_bundle), load_bundle(unrolled_bundle)
    with pytest.raises(ArtifactError, match="both its settings and its weights"):
        replace(plain, reconstruction=unrolled.reconstruction)
    with pytest.raises(ArtifactError, match="both its settings and its weights"):
        replace(unrolled, reconstruction={})


def test_a_default_that_is_not_there_is_refused(tiny_bundle, copied):
    fields = load_bundle(tiny_bundle).config.describe()
    with pytest.raises(ValidationError, match="no unrolled reconstruction"):
        BundleConfig.from_description({**fields, "reconstruction": "unrolled"})
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["bundle"]["reconstruction"] = "unrolled"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="no unrolled reconstruction"):
        load_bundle(copied)


def test_settings_from_before_the_network_still_load(copied, tiny_bundle):
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("reconstruction", "unrolled", "auto_strength", "auto_by_response", "unrolled_strength"):
        del manifest["bundle"][name]
    path.write_text(json.dumps(manifest))
    assert load_bundle(copied).config == load_bundle(tiny_bundle).config


def test_the_settings_of_the_network_are_in_the_digest(make_unrolled_bundle, unrolled_bundle, tmp_path):
    make_unrolled_bundle(tmp_path / "same")
    make_unrolled_bundle(tmp_path / "other", reconstruction="cbpdn")
    make_unrolled_bundle(tmp_path / "auto", auto_strength=AutoStrength(slope=0.7))
    digests = [bundle_digest(tmp_path / name) for name in ("same", "other", "auto")]
    assert digests[0] == bundle_digest(unrolled_bundle)
    assert len(set(digests)) == 3


def test_a_bundle_can_be_asked_for_either_reconstruction(tiny_bundle, unrolled_bundle):
    plain, unrolled = load_bundle(tiny_bundle), load_bundle(unrolled_bundle)
    assert unrolled.with_reconstruction(None) == unrolled
    assert unrolled.with_reconstruction("unrolled").config == unrolled.config
    assert unrolled.with_reconstruction("cbpdn").config.reconstruction == "cbpdn"
    assert plain.with_reconstruction("cbpdn").config == plain.config
    with pytest.raises(ArtifactError, match="tiny has no unrolled reconstruction"):
        plain.with_reconstruction("unrolled")
    with pytest.raises(ArtifactError, match="tiny has no unrolled reconstruction"):
        Purifier(plain, options=PurifyOptions(reconstruction="unrolled"))


@pytest.mark.parametrize("change", [{"iterations": 3}, {"deeper": ()}, {"sharing": "filters"}, {"stride": 2}])
def test_weights_must_fit_the_network(unrolled_bundle, change):
    bundle = load_bundle(unrolled_bundle)
    network = bundle.config.unrolled.model_copy(update=change)
    misfit = replace(bundle, config=bundle.config.model_copy(update={"unrolled": network}))
    with pytest.raises(ArtifactError, match="do not fit their settings"):
        Purifier(misfit)
    # The paper's reconstruction needs none of them.
    Purifier(misfit, options=PurifyOptions(reconstruction="cbpdn"))


def test_renaming_changes_the_name_alone(unrolled_bundle):
    bundle = load_bundle(unrolled_bundle)
    renamed = bundle.renamed("mine")
    assert renamed.config.describe() == {**bundle.config.describe(), "name": "mine"}
    assert renamed.reconstruction is bundle.reconstruction
