"""What is checked before Ray is used: an environment without its unsafe switches, and a cluster that answers.

Ray guards its readers against files that hold pickles, and lets environment variables take the guards away
again. No job here needs that, so a job with such a variable does not start. Where a cluster cannot be
joined, the error says what to change; a token is in no message.
"""

import os
import re
import socket
import time
from collections.abc import Mapping

import ray
from ray.exceptions import AuthenticationError

from acsr_ray.config import AcsrError

OLDEST_RAY = (2, 60)
"""Before, Parquet and WebDataset files could run code when they were read."""
UNSAFE_SWITCHES = re.compile(
    "RAY_DATA_AUTOLOAD_.*"
    "|RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION"
    "|RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE"
    "|TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
)
"""Variables that let data be unpickled, or write data that needs it."""
OFF = frozenset({"", "0", "false", "no", "off"})
CONNECT_SECONDS = 15.0
"""How long the head's port is tried; Ray itself would try for many minutes."""
TOKEN_HELP = (
    "set RAY_AUTH_MODE=token and give the cluster's token by RAY_AUTH_TOKEN_PATH (a file), by RAY_AUTH_TOKEN "
    "or in ~/.ray/auth_token, here and on every node"
)


class UnsafeEnvironmentError(AcsrError, RuntimeError):
    """Ray here would open files that can run code."""


class ResourceError(AcsrError, RuntimeError):
    """The cluster cannot be joined, or lacks what the settings ask for."""


def check_environment(environment: Mapping[str, str] = os.environ, version: str = ray.__version__) -> None:
    """Refuse an environment in which Ray opens files that can run code; for drivers and for workers.

    Args:
        environment: variables; a switch that is set to an "off" is none.
        version: Ray's.

    Raises:
        UnsafeEnvironmentError: a switch is on, or Ray is older than `OLDEST_RAY`.
    """
    found = sorted(
        name
        for name, value in environment.items()
        if UNSAFE_SWITCHES.fullmatch(name) and value.strip().lower() not in OFF
    )
    if found:
        raise UnsafeEnvironmentError(
            f"{', '.join(found)} lets data files run code; unset it here and in the cluster's environment"
        )
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_RAY:
        raise UnsafeEnvironmentError(f"Ray {version} has known holes; install 2.60 or newer")


def join_cluster(address: str) -> None:
    """Connect to a running cluster.

    Args:
        address: as `ray.init` takes it: `auto`, `HOST:PORT` of the head, or `ray://HOST:PORT`.

    Raises:
        ResourceError: no such cluster, it does not answer, or it does not accept the token.
    """
    check_listening(address)
    try:
        ray.init(address, log_to_driver=False)
    except AuthenticationError:
        # Ray's own text may name files; what helps is the same for all of them.
        raise ResourceError(f"Ray at {address} needs a token, and there is none: {TOKEN_HELP}") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        # Ray may wrap the cause, and the cause of that in its text alone.
        if "InvalidAuthToken" in f"{error} {error.__cause__}":
            raise ResourceError(
                f"the Ray cluster at {address} refuses the token, which is missing or wrong: {TOKEN_HELP}"
            ) from None
        raise ResourceError(
            f"cannot join the Ray cluster at {address}: {error}. --ray.address or RAY_ADDRESS names a "
            "running cluster as HOST:PORT of its head; without either a local Ray is started"
        ) from error


def check_listening(address: str) -> None:
    """Refuse an address where nothing listens; one without host and port is left to Ray.

    Args:
        address: as for `join_cluster`.

    Raises:
        ResourceError: nothing answers there within `CONNECT_SECONDS`.
    """
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)", address)
    if match is None:
        return
    if not 0 < int(match[2]) < 2**16:
        raise ResourceError(f"the Ray address {address} has no valid port; it is HOST:PORT of the head")
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(min(1.0, CONNECT_SECONDS / 10))
                continue
            raise ResourceError(
                f"nothing answers at the Ray address {address} ({error}); is the head up, and does a network "
                "policy let this machine reach it?"
            ) from None
        return
