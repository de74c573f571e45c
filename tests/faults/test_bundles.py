"""Fault row 25: a bundle that was changed, mixed from two, or made hostile is refused before it is used."""

import json
import pickle
import shutil

import pytest
import torch

from acsr_ray.artifacts import MANIFEST, ArtifactError, file_digest
from acsr_ray.purification.bundle import CLUSTERS, DICTIONARIES, ENCODER, RECONSTRUCTION, load_bundle

FILES = (ENCODER, CLUSTERS, DICTIONARIES, RECONSTRUCTION)


@pytest.fixture
def bundle(unrolled_bundle, tmp_path):
    return shutil.copytree(unrolled_bundle, tmp_path / "bundle")


def edit(directory, **changes):
    path = directory / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def sign(bundle, *names):
    """Write the digests of files as they are now into the manifest: an attacker who changes that as well."""
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle, files={**files, **{name: file_digest(bundle / name) for name in names}})


def test_the_copy_loads(bundle):
    assert load_bundle(bundle).reconstruction


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.001, 0.5, 1.0])
def test_one_flipped_bit(bundle, name, where):
    data = bytearray((bundle / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x10
    (bundle / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name} was changed"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_bundle(bundle, make_unrolled_bundle, tmp_path, name):
    other = make_unrolled_bundle(tmp_path / "other", "filters")
    tensors = (other / name).read_bytes()
    # The two share an encoder, which then differs in its last weight.
    changed = tensors if tensors != (bundle / name).read_bytes() else tensors[:-1] + bytes([tensors[-1] ^ 1])
    (bundle / name).write_bytes(changed)
    with pytest.raises(ArtifactError, match=f"{name} was changed"):
        load_bundle(bundle)


def test_a_manifest_of_another_bundle(bundle, make_bundle, tmp_path):
    other = make_bundle(tmp_path / "other", name="other")
    shutil.copy(other / MANIFEST, bundle / MANIFEST)
    (bundle / DICTIONARIES).write_bytes((bundle / DICTIONARIES).read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtifactError, match="was changed"):
        load_bundle(bundle)


@pytest.mark.parametrize("version", [0, 2, None, "1", 1.5, [1]])
def test_a_manifest_of_another_version(bundle, version):
    edit(bundle, schema_version=version)
    with pytest.raises(ArtifactError, match="schema version"):
        load_bundle(bundle)


def test_settings_that_a_newer_release_may_have(bundle):
    settings = json.loads((bundle / MANIFEST).read_text())["bundle"]
    edit(bundle, bundle={**settings, "from_the_future": True})
    with pytest.raises(ArtifactError, match="settings"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["../secret", "x/../../secret", "{folder}/secret", "link"])
def test_a_path_outside(bundle, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("x")
    (bundle / "link").symlink_to(secret)
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle, files={**files, name.format(folder=tmp_path): file_digest(secret)})
    with pytest.raises(ArtifactError, match="outside the artifact"):
        load_bundle(bundle)


@pytest.mark.parametrize("digest", [None, 3, [], {}, "", "0" * 64])
def test_digests_that_are_none(bundle, digest):
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle, files={**files, ENCODER: digest})
    with pytest.raises(ArtifactError, match=ENCODER):
        load_bundle(bundle)


def test_a_name_that_no_file_can_have(bundle):
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle, files={**files, "n\0ul": "0" * 64})
    with pytest.raises(ArtifactError, match="lists"):
        load_bundle(bundle)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (type(self.canary).touch, (self.canary,))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_place_of_tensors(bundle, tmp_path, name, how):
    canary = tmp_path / "canary"
    if how == "pickle":
        (bundle / name).write_bytes(pickle.dumps(Bomb(canary)))
    else:
        torch.save({"atoms": Bomb(canary)}, bundle / name)
    with pytest.raises(ArtifactError, match="was changed"):
        load_bundle(bundle)
    sign(bundle, name)
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_bundle(bundle)
    assert not canary.exists()
    # What was refused is live.
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()


@pytest.mark.parametrize("name", [CLUSTERS, DICTIONARIES])
def test_tensors_of_other_names(bundle, name):
    shutil.copy(bundle / ENCODER, bundle / name)
    sign(bundle, name)
    with pytest.raises(ArtifactError, match="no usable tensors"):
        load_bundle(bundle)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{", "null", '{"files": {}}', "\ud800"])
def test_manifests_that_are_none(bundle, text):
    (bundle / MANIFEST).write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ArtifactError):
        load_bundle(bundle)
