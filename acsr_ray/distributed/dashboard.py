"""A cluster's dashboard, which takes jobs: found, asked what it is, joined, or an error that says why not.

The dashboard answers one question without a token: whether it wants one. So a missing token, a wrong one and
a door that stands open can be told apart before anything is sent. A token is in no message.
"""

import http.client
import json
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray

# Ray has no public call for it.
from ray.dashboard.utils import ray_address_to_api_server_url
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobSubmissionClient

from acsr_ray.config import AcsrError
from acsr_ray.distributed.joining import TOKEN_HELP, check_environment, check_listening

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's own command line looks, in this order; Ray lets them win over an address that is given."""
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
ANSWER_S = 15.0
"""How long a request may stay without an answer."""
OLDEST_PYTHON = (3, 11)


class SubmitError(AcsrError, RuntimeError):
    """The cluster cannot be reached or used, or what is submitted cannot work there."""


class JobsClient(JobSubmissionClient):
    """Ray's client, whose requests end, and which says what to do about a token.

    Ray would wait for ever for a head that stands still.
    """

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:  # noqa: ANN401
        try:
            return super()._do_request(method, endpoint, **{"timeout": 4 * ANSWER_S, **options})
        except AuthenticationError as error:
            # Ray's text may name files; a request without a token and one with a wrong token are told apart.
            wrong = "Authentication failed" in str(error)
            what = "refuses the token" if wrong else "needs a token, and there is none"
            raise SubmitError(f"the cluster at {self.get_address()} {what}: {TOKEN_HELP}") from None

    def ask(self, endpoint: str) -> dict[str, Any]:
        """Return a JSON answer of the dashboard; {} where it has none."""
        reply = self._do_request("GET", endpoint, timeout=ANSWER_S)
        answer = reply.json() if reply.status_code == 200 else {}
        return answer if isinstance(answer, dict) else {}


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that lets this machine in."""

    address: str
    authentication: str
    """`token` or `disabled`."""
    ray_version: str
    python_version: str
    """Of the cluster; "" where it does not say."""
    client: JobsClient


def find_address(given: str | None) -> str:
    """Return the dashboard's address: as given, else from Ray's variables, else on this machine.

    A bare HOST:PORT is a dashboard's where it is given. In Ray's variables it is what Ray takes it for, the
    head's own port, which knows where the dashboard is: KubeRay sets RAY_ADDRESS so in every container.

    Raises:
        SubmitError: it is no `http(s)://HOST:PORT`, or no head answers that knows a dashboard.
    """
    variable = next((name for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if given or variable is None:
        found = given or DEFAULT_ADDRESS
    else:
        found = os.environ[variable]
        if "://" not in found:
            found = _dashboard_of(found, variable)
    address = (found if "://" in found else f"http://{found}").rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SubmitError(
            f"{found} is not a dashboard; --address is http://HOST:8265, and neither the head's own port nor "
            "a Ray client's"
        )
    if parts.username or parts.password:
        raise SubmitError(f"--address holds credentials; {TOKEN_HELP}")
    return address


def _dashboard_of(head: str, variable: str) -> str:
    """Return the address of the dashboard that a head at HOST:PORT, or `auto`, knows of."""
    help_text = (
        f"{variable}={head} is a head's own port; RAY_API_SERVER_ADDRESS or --address is http://HOST:8265"
    )
    try:
        check_listening(head)
        return ray_address_to_api_server_url(head)
    except AuthenticationError:
        # Ray's own text may name files.
        raise SubmitError(f"the head at {head} does not accept the token: {TOKEN_HELP}") from None
    except (AcsrError, RayError, OSError, ValueError, RuntimeError) as error:
        raise SubmitError(f"no head tells where its dashboard is: {error}; {help_text}") from None


def open_dashboard(address: str) -> Dashboard:
    """Ask the dashboard what it is, and join it.

    Args:
        address: of `find_address`.

    Raises:
        SubmitError: nothing answers there, or it does not accept the token.
        UnsafeEnvironmentError: the cluster's Ray is too old.
    """
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    authentication = _authentication_mode(address)
    _warn_of_open_doors(address, authentication)
    client = _join(address)
    ray_version = str(client.ask("/api/version").get("ray_version", ""))
    metadata = client.ask("/api/v0/cluster_metadata")
    python_version = str((metadata.get("data") or {}).get("pythonVersion", ""))
    _check_versions(ray_version, python_version)
    return Dashboard(address, authentication, ray_version, python_version, client)


def _authentication_mode(address: str) -> str:
    url = f"{address}/api/authentication_mode"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as reply:
            answer = json.load(reply)
        return str(answer["authentication_mode"])
    except urllib.error.HTTPError as error:
        raise SubmitError(
            f"what answers at {address} is no dashboard of Ray 2.60 or newer (HTTP {error.code})"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise SubmitError(
            f"no dashboard answers at {address} ({reason}); is the head up with its dashboard, and is its "
            "port forwarded to this machine (`ray dashboard cluster.yaml`, `kubectl port-forward`)?"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise SubmitError(f"what answers at {address} is no dashboard of Ray; its port is 8265") from None


def _warn_of_open_doors(address: str, authentication: str) -> None:
    parts = urlsplit(address)
    local = parts.hostname in LOCAL_HOSTS
    wants_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if authentication == "disabled" and (not local or wants_token):
        logger.warning(
            "the cluster at %s lets everyone in who reaches it, and who submits a job runs code there: start "
            "it with RAY_AUTH_MODE=token",
            address,
        )
    elif authentication == "token" and parts.scheme == "http" and not local:
        logger.warning("the token goes to %s unencrypted: use a tunnel, or https", address)


def _join(address: str) -> JobsClient:
    try:
        with _without(ADDRESS_VARIABLES):
            return JobsClient(address)
    except SubmitError:
        raise
    except AuthenticationError:
        raise SubmitError(
            f"the cluster at {address} needs a token, and there is none that can be read: {TOKEN_HELP}"
        ) from None
    except (OSError, RuntimeError) as error:
        raise SubmitError(f"the dashboard at {address} does not take jobs: {error}") from None


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _check_versions(ray_version: str, python_version: str) -> None:
    check_environment({}, ray_version)
    if ray_version != ray.__version__:
        logger.warning("the cluster has Ray %s, this machine %s", ray_version, ray.__version__)
    numbers = tuple(int(number) for number in re.findall(r"\d+", python_version)[:2])
    if numbers and numbers < OLDEST_PYTHON:
        raise SubmitError(f"the cluster has Python {python_version}; 3.11 or newer is needed there")
    if numbers and numbers != sys.version_info[:2]:
        here = ".".join(map(str, sys.version_info[:3]))
        logger.warning("the cluster has Python %s, this machine %s", python_version, here)
