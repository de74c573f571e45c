"""Directory artifacts: safetensors files plus a JSON manifest that is written last.

A directory without `manifest.json` does not exist as an artifact. The manifest holds the artifact's kind,
schema version and the SHA-256 digest of every file; `load_artifact` checks them all, and nothing here
ever unpickles, so an artifact is data, never code.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from acsr_ray import __version__
from acsr_ray.config import AcsrError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class ArtifactError(AcsrError, RuntimeError):
    """An artifact that is missing, of another kind or version, or whose bytes were changed."""


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that readers see either the old content or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with staging.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically, keys in the given order."""
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors as one safetensors file, atomically."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, save(cpu))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file to CPU tensors; `ArtifactError` if it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(content: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def begin_artifact(directory: Path) -> None:
    """Make the directory and withdraw its manifest, so that a half-written artifact is not one."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)


def finish_artifact(directory: Path, kind: str, files: Iterable[str], content: Mapping[str, Any]) -> None:
    """Write the manifest, which makes the artifact exist.

    Args:
        directory: the artifact's directory, all `files` already in it.
        kind: what it is (`baseline`, `semantics`, `robust`, `bundle`).
        files: paths relative to the directory whose digests the manifest holds.
        content: settings, metrics and whatever else the kind records.
    """
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "package_version": __version__,
        **content,
        "files": {name: file_digest(directory / name) for name in sorted(files)},
    }
    write_json(directory / MANIFEST, manifest)


def save_tensor_artifact(
    directory: Path, kind: str, file: str, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]
) -> None:
    """Write an artifact whose only file holds tensors; see `finish_artifact`."""
    begin_artifact(directory)
    save_tensors(directory / file, tensors)
    finish_artifact(directory, kind, [file], content)


def artifact_kind(directory: Path) -> str | None:
    """Return what the manifest of a directory says it is, None when there is no readable manifest."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (ValueError, RecursionError, OSError):
        return None
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    return kind if isinstance(kind, str) else None


def load_artifact(directory: Path, kind: str) -> dict[str, Any]:
    """Return an artifact's manifest after checking its kind, version and every digest."""
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"no {kind} at {directory}: {MANIFEST} is missing") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{path} is not an artifact manifest")
    if manifest.get("kind") != kind:
        raise ArtifactError(f"{directory} is a {manifest.get('kind')!r} artifact, not a {kind!r}")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {manifest.get('schema_version')}, expected {SCHEMA_VERSION}"
        )
    for name, digest in manifest["files"].items():
        if "\0" in name or not isinstance(digest, str):
            raise ArtifactError(f"{path} lists {name!r} without a digest, or by a name that no file has")
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()):
            raise ArtifactError(f"{path} lists {name!r}, which is outside the artifact")
        if not file.is_file():
            raise ArtifactError(f"{file} is missing")
        if (got := file_digest(file)) != digest:
            raise ArtifactError(f"{file} was changed: digest {got[:12]}, manifest {digest[:12]}")
    return manifest


def artifact_digest(directory: Path) -> str:
    """Return the digest that names an artifact: the SHA-256 of its manifest."""
    return file_digest(directory / MANIFEST)
