"""What a job takes along: a working directory of a size that Ray takes, an environment without secrets."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray._private import ray_constants

# Ray has no public call for it, and only its own rules tell what it will send.
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes
from ray.runtime_env import RuntimeEnv

from acsr_ray.distributed.dashboard import SubmitError

logger = logging.getLogger(__name__)

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Read by the job's supervisor, a Ray actor that has the job's environment: so it is set there."""
SHOWN_FILES = 5
SECRET = re.compile(r"(?i)TOKEN|SECRET|PASSW|CREDENTIAL|(ACCESS|API|PRIVATE|ACCOUNT)_?KEY")
REFERENCE = re.compile(r"(?i)_(PATH|FILE|DIR|URI|URL)$")


@dataclass(frozen=True)
class Upload:
    """The files of a working directory or a module that go to the cluster."""

    files: tuple[tuple[int, str], ...]
    """Bytes and path of each, largest first."""

    @property
    def package_bytes(self) -> int:
        """Size of the package: Ray zips without compression, 76 bytes and twice the path for each file."""
        return 22 + sum(size + 76 + 2 * len(path.encode()) for size, path in self.files)


def measure_upload(directory: Path, excludes: list[str], *, is_module: bool = False) -> Upload:
    """Return what Ray would send of a directory, by its rules: .gitignore, .rayignore, excludes.

    Args:
        directory: the working directory, or a package of `py_modules`.
        excludes: further patterns, in the language of .gitignore.
        is_module: paths begin with the directory's own name, and Ray's default patterns do not count.
    """
    root = directory.absolute()
    found: list[tuple[int, str]] = []

    def add(path: Path) -> None:
        if path.is_file():
            found.append((path.stat().st_size, str(path.relative_to(root.parent if is_module else root))))

    defaults = [] if is_module else ray_constants.get_runtime_env_default_excludes()
    heeds_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    quiet = logging.getLogger(f"{__name__}.travel")
    quiet.setLevel(logging.ERROR)
    ignored = [_get_excludes(root, [*defaults, *excludes])]
    _dir_travel(root, ignored, add, include_gitignore=heeds_gitignore, logger=quiet)
    return Upload(tuple(sorted(found, reverse=True)))


def check_upload(directory: Path, excludes: list[str]) -> Upload:
    """Return what would be sent of a working directory.

    Raises:
        SubmitError: there is no such directory, or it is larger than Ray takes.
    """
    if not directory.is_dir():
        raise SubmitError(f"--working-dir {directory} is no directory")
    return _sized(measure_upload(directory, excludes), f"--working-dir {directory}")


def check_module(path: Path, excludes: list[str]) -> Upload:
    """Return what would be sent of an entry of `py_modules`, each a package of its own.

    Raises:
        SubmitError: it is no directory, `.py` file or `.whl` file, or it is larger than Ray takes.
    """
    name = f"py_modules: {path}"
    if path.is_dir():
        return _sized(measure_upload(path, excludes, is_module=True), name)
    if not path.is_file() or path.suffix not in (".py", ".whl"):
        raise SubmitError(f"{name} is neither a directory nor a .py or .whl file")
    return _sized(Upload(((path.stat().st_size, path.name),)), name)


def _sized(upload: Upload, name: str) -> Upload:
    size, limit = upload.package_bytes / 2**20, GCS_STORAGE_MAX_SIZE / 2**20
    largest = ", ".join(f"{path} ({count / 2**20:.1f} MiB)" for count, path in upload.files[:SHOWN_FILES])
    if upload.package_bytes >= GCS_STORAGE_MAX_SIZE:
        raise SubmitError(
            f"{name} has {size:.1f} MiB, and Ray takes {limit:.0f}; largest: {largest}. Leave files out by "
            ".gitignore, .rayignore or --exclude, or install the package in the cluster's image instead"
        )
    logger.info("%s: %d files, %.1f MiB of at most %.0f", name, len(upload.files), size, limit)
    if upload.package_bytes >= GCS_STORAGE_MAX_SIZE / 2:
        logger.warning("that is more than half of what Ray takes; largest: %s", largest)
    return upload


def job_environment(
    path: Path | None, working_dir: str | None, excludes: tuple[str, ...], stop_wait_s: int
) -> dict[str, Any]:
    """Return the job's runtime environment.

    Args:
        path: YAML file with a runtime environment to start from; what its `py_modules` send is measured too.
        working_dir: directory to send, or URI of an archive; its size is checked.
        excludes: patterns of files in it that stay here.
        stop_wait_s: seconds between SIGTERM and SIGKILL when the job is stopped.

    Raises:
        SubmitError: the file, the directory or a module cannot be used, or a variable's name says that it is
            secret.
    """
    environment = _read(path) if path else {}
    variables: dict[str, str] = environment.get("env_vars") or {}
    secrets = sorted(name for name in variables if SECRET.search(name) and not REFERENCE.search(name))
    if secrets:
        raise SubmitError(
            f"{path}: everyone who reaches the dashboard can read {', '.join(secrets)} there; give it to the "
            "cluster's nodes instead (a role, a secret's reference, a file that its _PATH or _FILE names)"
        )
    environment["env_vars"] = {STOP_WAIT: str(stop_wait_s), **variables}
    if working_dir is not None:
        environment["working_dir"] = working_dir
    if excludes:
        environment["excludes"] = [*(environment.get("excludes") or []), *excludes]
    left_out = environment.get("excludes") or []
    sent = environment.get("working_dir")
    if sent and "://" not in str(sent):
        check_upload(Path(sent), left_out)
    for module in environment.get("py_modules") or []:
        if "://" not in str(module):
            check_module(Path(module), left_out)
    return environment


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
        # Ray checks names and types.
        RuntimeEnv(**content)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise SubmitError(f"--runtime-env {path} is not a runtime environment: {error}") from None
    return dict(content)
