"""Artifacts: what is missing, changed, half-written, of another kind, or reaches outside is refused."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.artifacts import (
    MANIFEST,
    ArtifactError,
    artifact_digest,
    atomic_write,
    begin_artifact,
    file_digest,
    finish_artifact,
    json_digest,
    load_artifact,
    load_tensors,
    save_tensors,
)

WEIGHTS = "sub/weights.safetensors"


def build(directory):
    begin_artifact(directory)
    save_tensors(directory / WEIGHTS, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).int()})
    (directory / "notes.json").write_text('{"x": 1}')
    finish_artifact(directory, "robust", [WEIGHTS, "notes.json"], {"metrics": {"accuracy": 0.5}})
    return directory


@pytest.fixture
def artifact(tmp_path):
    return build(tmp_path / "robust")


@pytest.fixture(scope="module")
def shared_artifact(tmp_path_factory):
    return build(tmp_path_factory.mktemp("artifacts") / "robust")


def edit_manifest(directory, **changes):
    path = directory / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(artifact):
    manifest = load_artifact(artifact, "robust")
    assert manifest["metrics"] == {"accuracy": 0.5}
    assert set(manifest["files"]) == {WEIGHTS, "notes.json"}
    tensors = load_tensors(artifact / WEIGHTS)
    assert torch.equal(tensors["a"], torch.arange(6.0).reshape(2, 3))
    assert tensors["b"].dtype == torch.int32


def test_digest_names_the_content(artifact):
    before = artifact_digest(artifact)
    assert before == file_digest(artifact / MANIFEST)
    build(artifact)
    assert artifact_digest(artifact) == before
    edit_manifest(artifact, metrics={"accuracy": 0.6})
    assert artifact_digest(artifact) != before


def test_another_kind_is_refused(artifact):
    with pytest.raises(ArtifactError, match="'robust' artifact, not a 'bundle'"):
        load_artifact(artifact, "bundle")


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_version_is_refused(artifact, version):
    edit_manifest(artifact, schema_version=version)
    with pytest.raises(ArtifactError, match="schema version"):
        load_artifact(artifact, "robust")


def test_missing_manifest_is_refused(artifact, tmp_path):
    (artifact / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        load_artifact(artifact, "robust")
    with pytest.raises(ArtifactError, match="is missing"):
        load_artifact(tmp_path / "nowhere", "robust")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"files": []}', '{"kind": "robust"}', "\x00\xff"])
def test_manifests_that_are_not_manifests_are_refused(artifact, text):
    (artifact / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match="manifest"):
        load_artifact(artifact, "robust")


def test_missing_file_is_refused(artifact):
    (artifact / "notes.json").unlink()
    with pytest.raises(ArtifactError, match=r"notes\.json is missing"):
        load_artifact(artifact, "robust")


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_flipped_bit_is_refused(shared_artifact, data):
    name = data.draw(st.sampled_from([WEIGHTS, "notes.json"]))
    path = shared_artifact / name
    original = path.read_bytes()
    changed = bytearray(original)
    changed[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match="was changed"):
            load_artifact(shared_artifact, "robust")
    finally:
        path.write_bytes(original)
    load_artifact(shared_artifact, "robust")


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda _: b""])
def test_another_length_is_refused(artifact, change):
    path = artifact / WEIGHTS
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArtifactError, match="was changed"):
        load_artifact(artifact, "robust")


@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_outside_is_refused(artifact, tmp_path, absolute):
    secret = tmp_path / "secret"
    secret.write_text("x")
    name = str(secret) if absolute else "../secret"
    edit_manifest(artifact, files={name: file_digest(secret)})
    with pytest.raises(ArtifactError, match="outside the artifact"):
        load_artifact(artifact, "robust")


def test_a_link_to_outside_is_refused(artifact, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    (artifact / "link").symlink_to(secret)
    edit_manifest(artifact, files={"link": file_digest(secret)})
    with pytest.raises(ArtifactError, match="outside the artifact"):
        load_artifact(artifact, "robust")


def test_half_written_is_refused(artifact):
    begin_artifact(artifact)
    assert (artifact / WEIGHTS).exists()
    with pytest.raises(ArtifactError, match="is missing"):
        load_artifact(artifact, "robust")


def test_a_pickle_is_not_loaded(tmp_path):
    fired = tmp_path / "fired"

    class Bomb:
        def __reduce__(self):
            return (fired.touch, ())

    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArtifactError, match="not a readable safetensors"):
        load_tensors(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="not a readable safetensors"):
        load_tensors(path)
    assert not fired.exists()


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, b"8\0\0\0\0\0\0\0{}"])
def test_damaged_safetensors_are_refused(tmp_path, data):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        load_tensors(path)


def test_missing_tensors_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.safetensors"):
        load_tensors(tmp_path / "none.safetensors")


def test_tensors_are_stored_as_they_look(tmp_path):
    grid = torch.arange(12.0).reshape(3, 4)
    save_tensors(
        tmp_path / "t", {"columns": grid.T, "part": grid[:, ::2], "leaf": torch.ones(2).requires_grad_()}
    )
    loaded = load_tensors(tmp_path / "t")
    assert torch.equal(loaded["columns"], grid.T)
    assert torch.equal(loaded["part"], grid[:, ::2])
    assert not loaded["leaf"].requires_grad


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "deep" / "file"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_json_digest_ignores_key_order_only():
    assert json_digest({"a": 1, "b": [1, 2]}) == json_digest({"b": [1, 2], "a": 1})
    assert json_digest({"a": 1, "b": [1, 2]}) != json_digest({"a": 1, "b": [2, 1]})
