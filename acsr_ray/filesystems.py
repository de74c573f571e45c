"""How a process reaches files of any store: endpoints and credentials, in drivers and in workers.

A job resolves its settings once, in the driver, to a `Connection`, and hands it to its workers as the answer
to a call between processes. Neither Ray's runtime environment nor an actor's constructor will do for that:
Ray writes the first to its logs and keeps the second in its head's store. Settings hold names of environment
variables, never secrets, so they may be logged, and nothing of them binds an output.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs
from pydantic import Field

from acsr_ray.config import AcsrError, JobSettings, MissingExtraError, Settings

S3, GOOGLE, HUB = ("s3", "s3a"), ("gs", "gcs"), ("hf",)
EXTRAS = {**dict.fromkeys(S3, "s3"), **dict.fromkeys(GOOGLE, "gs"), **dict.fromkeys(HUB, "hf")}

CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Belong together: a key of one machine is nothing with the secret of another."""
VARIABLES = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "STORAGE_EMULATOR_HOST",
    "ACSR_STORAGE_DEADLINE_S",
)
"""What else workers get of the driver's environment. Names of files and of profiles are not here: other
machines have other files."""

IDENTITY = {"profile", "anonymous", "access_key_variable", "secret_key_variable", "token_variable"}

PASSWORD = re.compile(r"://[^/:@]*:[^/@]*@|^https?://[^/@]*@")
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"


class StorageLocationError(AcsrError, ValueError):
    """A location that cannot be used, or cannot be reached as the settings say."""


class StorageSettings(Settings):
    """Where a store is and who asks.

    What is not given comes from the environment, as the store's own tools take it (`AWS_ENDPOINT_URL`,
    `AWS_ACCESS_KEY_ID`, `HF_TOKEN`, roles of machines and so on).
    """

    endpoint_url: str | None = Field(None, pattern=r"^https?://[^@\s]+$")
    """Address of another service than the public one: of S3, of the Hub (hf) or of an emulator (gs)."""
    region: str | None = None
    """Of S3."""
    profile: str | None = None
    """Section of ~/.aws of S3, which every node must have."""
    anonymous: bool = False
    """Ask without credentials, as public data allow."""
    access_key_variable: str | None = Field(None, pattern=VARIABLE)
    """Name of the environment variable, here, that holds the access key of S3; not the key itself."""
    secret_key_variable: str | None = Field(None, pattern=VARIABLE)
    """Name of the variable with its secret."""
    token_variable: str | None = Field(None, pattern=VARIABLE)
    """Name of the variable with the session token of S3, or the token of the Hub."""


@dataclass(frozen=True)
class Access:
    """Settings with the values of the variables that they name."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    def options(self, protocol: str) -> dict[str, object]:
        """Return what the file system of a protocol is made with."""
        if protocol in S3:
            return self._s3_options()
        if protocol in GOOGLE:
            token = "anon" if self.anonymous else None
            return _given(endpoint_url=self.endpoint_url, token=token) | {"use_listings_cache": False}
        if protocol in HUB:
            token_or_none = False if self.anonymous else self.token
            return _given(endpoint=self.endpoint_url, token=token_or_none) | {"use_listings_cache": False}
        return {}

    def _s3_options(self) -> dict[str, object]:
        # Short, because `patiently` tries again; a hung connection must not pass for a long answer.
        waits = {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"mode": "standard", "max_attempts": 2},
        }
        given = _given(
            endpoint_url=self.endpoint_url,
            profile=self.profile,
            key=self.access_key,
            secret=self.secret_key,
            token=self.token,
            anon=self.anonymous or None,
            client_kwargs={"region_name": self.region} if self.region else None,
        )
        return given | {"use_listings_cache": False, "config_kwargs": waits}


def _given(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Connection:
    """What a process needs to reach a job's input and output; its text shows no secret."""

    source: Access = Access()
    """For everything but the output."""
    target: Access = Access()
    target_root: str = ""
    """Location of the output, "" for none."""
    environment: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    """Variables of the driver; None for one that workers must not have either."""

    def access(self, uri: str) -> Access:
        """Return how a location is reached."""
        root = self.target_root.rstrip("/")
        return self.target if root and f"{uri}/".startswith(f"{root}/") else self.source


_connection = Connection()


def resolve_connection(
    storage: StorageSettings,
    source: StorageSettings,
    output: str = "",
    environment: Mapping[str, str] = os.environ,
) -> Connection:
    """Look up what settings name.

    Args:
        storage: of input and output.
        source: what differs for the input.
        output: location of the output, absolute.
        environment: where the variables are.

    Raises:
        StorageLocationError: a variable that is named and not set.
    """
    differing = source.model_dump(exclude_defaults=True)
    # Who asks is one thing: half of it would mix two identities.
    shared = storage.model_dump(exclude=IDENTITY if IDENTITY & differing.keys() else None)
    both = StorageSettings.model_validate({**shared, **differing})
    carried: dict[str, str | None] = {name: environment[name] for name in VARIABLES if name in environment}
    if any(name in environment for name in CREDENTIALS):
        carried |= {name: environment.get(name) for name in CREDENTIALS}
    return Connection(_resolved(both, environment), _resolved(storage, environment), output, carried)


def _resolved(settings: StorageSettings, environment: Mapping[str, str]) -> Access:
    def value(option: str) -> str | None:
        name = getattr(settings, f"{option}_variable")
        if name is None:
            return None
        if not environment.get(name):
            # Without what was given: somebody may have given the secret itself.
            raise StorageLocationError(
                f"storage.{option.replace('_', '-')}-variable names an environment variable that is not set"
            )
        return environment[name]

    return Access(
        settings.endpoint_url,
        settings.region,
        settings.profile,
        settings.anonymous,
        value("access_key"),
        value("secret_key"),
        value("token"),
    )


def connect(connection: Connection) -> None:
    """Reach stores in this process as a driver does, from now on; for workers."""
    global _connection
    _connection = connection
    for name, value in connection.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def current_connection() -> Connection:
    """Return how this process reaches stores now."""
    return _connection


@contextmanager
def connected(connection: Connection) -> Iterator[Connection]:
    """Reach stores so in this process until the block ends; for drivers, whose environment stays as it is."""
    global _connection
    before, _connection = _connection, connection
    try:
        yield connection
    finally:
        _connection = before


class StoreSettings(JobSettings):
    """Base of the settings of whatever opens stores."""

    output: str | None = None
    storage: StorageSettings = StorageSettings()
    """How the stores of input and output are reached."""
    input_storage: StorageSettings = StorageSettings()
    """What differs for the input."""

    @property
    def connection(self) -> Connection:
        """How input and output are reached; `StorageLocationError` where a variable is not set."""
        # What is not a URI is a path, for which there is nothing to settle.
        remote = self.output if self.output and "://" in self.output else ""
        return resolve_connection(self.storage, self.input_storage, remote)


SettingsT = TypeVar("SettingsT", bound=StoreSettings)


def over_stores(function: Callable[[SettingsT], dict[str, Any]]) -> Callable[[SettingsT], dict[str, Any]]:
    """Make a job reach stores as its settings say while it works."""

    @wraps(function)
    def connecting(settings: SettingsT) -> dict[str, Any]:
        with connected(settings.connection):
            return function(settings)

    return connecting


def open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URI, which remembers no listings, and the path in it.

    Raises:
        MissingExtraError: its library is not installed.
        StorageLocationError: a scheme that nobody knows, or a password in the URI.
    """
    if PASSWORD.search(uri):
        # It would be in logs, manifests and reports.
        raise StorageLocationError("a URI must not hold a password; see the options `storage`")
    protocol = uri.partition("://")[0] if "://" in uri else ""
    try:
        fs, path = url_to_fs(uri, **_connection.access(uri).options(protocol))
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        told = f"pip install 'acsr-ray[{extra}]' ({error})" if extra else str(error)
        raise MissingExtraError(f"{uri} needs a library: {told}") from error
    except ValueError as error:
        raise StorageLocationError(f"{uri} cannot be opened: {error}") from error
    if protocol in (*GOOGLE, *HUB):
        # The Hub's remembers listings whatever it is told, and what changed would look as it was before.
        fs.invalidate_cache()
    return fs, path.rstrip("/")
