"""What is checked before Ray is used: unsafe switches, old releases, clusters that let no one in."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from acsr_ray.distributed import joining
from acsr_ray.distributed.joining import (
    ResourceError,
    UnsafeEnvironmentError,
    check_environment,
    join_cluster,
)
from acsr_ray.distributed.runtime import RaySettings, ray_session

TOKEN = "0123456789abcdef0123456789abcdef"
WRONG = "ffffffffffffffffffffffffffffffff"


@pytest.mark.parametrize(
    "name",
    [
        "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
        "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
        "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
        "RAY_DATA_AUTOLOAD_OF_A_LATER_RELEASE",
        "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
        "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    ],
)
def test_unsafe_switches(name):
    for value in ("1", "true", "TRUE", "yes", " 1 ", "2"):
        with pytest.raises(UnsafeEnvironmentError, match=f"^{name} lets data files run code; unset it"):
            check_environment({name: value, "PATH": "/bin"})
    for value in ("", "0", "false", "False", "no"):
        check_environment({name: value})


def test_a_normal_environment(monkeypatch):
    check_environment()
    check_environment({"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "MY_RAY_DATA_AUTOLOAD_X": "1"})
    monkeypatch.setenv("RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR", "1")
    with pytest.raises(UnsafeEnvironmentError):
        check_environment()


def test_every_switch_of_the_installed_ray_is_known():
    text = "\n".join(path.read_text() for path in Path(ray.__file__).parent.joinpath("data").rglob("*.py"))
    found = set(re.findall(r"RAY_[A-Z_]*(?:AUTOLOAD|UNSAFE|PICKLE|UNTRUSTED|TRUST)[A-Z_]*", text))
    assert len(found) >= 4
    assert [name for name in found if not joining.UNSAFE_SWITCHES.fullmatch(name)] == []


@pytest.mark.parametrize("version", ["2.59.1", "2.9.3", "1.13.0", "2.55.0rc1"])
def test_old_releases(version):
    with pytest.raises(UnsafeEnvironmentError, match=rf"Ray {version} has known holes"):
        check_environment({}, version)


@pytest.mark.parametrize("version", ["2.60.0", "2.61.2", "3.0.0.dev0"])
def test_new_releases(version):
    check_environment({}, version)


def test_a_session_does_not_start_in_an_unsafe_environment(monkeypatch):
    monkeypatch.setenv("RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR", "true")
    with pytest.raises(UnsafeEnvironmentError), ray_session(RaySettings()):
        pass


@pytest.fixture
def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_an_address_where_nothing_listens(free_port, monkeypatch):
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 0.3)
    started = time.monotonic()
    for address in (f"127.0.0.1:{free_port}", f"ray://127.0.0.1:{free_port}", "no-such-host.invalid:6379"):
        with pytest.raises(ResourceError, match=f"nothing answers at the Ray address {address}"):
            join_cluster(address)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("address", ["nonsense:abc", "127.0.0.1:99999"])
@pytest.mark.timeout(30)
def test_what_is_no_address(address):
    with pytest.raises(ResourceError, match=f"{address}.*HOST:PORT"):
        join_cluster(address)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head with token authentication, without CPUs; yields its address. It ends with its own processes."""
    folder = tmp_path_factory.mktemp("r")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    program = os.path.join(os.path.dirname(sys.executable), "ray")
    command = [
        program,
        "start",
        "--head",
        f"--port={port}",
        "--num-cpus=0",
        "--include-dashboard=false",
        "--block",
    ]
    # Ray puts sockets there, whose paths may have 107 bytes.
    short = f"/tmp/acsr-{os.getpid()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--temp-dir={short}", "--object-store-memory=80000000"],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (folder / "log").read_text(errors="replace"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        # The group that it leads; asked to end, Ray waits for its children for longer than a test should.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(short)


def drive(address, home, **environment):
    """Join a cluster as a program of its own, whose home has no token; return its output and exit code."""
    code = (
        "import logging, ray\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "from acsr_ray.config import AcsrError\n"
        "from acsr_ray.distributed.runtime import RaySettings, ray_session\n"
        "try:\n"
        f"    with ray_session(RaySettings(address={address!r})):\n"
        "        print('nodes', len(ray.nodes()))\n"
        "except AcsrError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert TOKEN not in done.stdout + done.stderr
    assert WRONG not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_the_right_token_is_let_in(head, tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    assert "nodes 1" in drive(head, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert "nodes 1" in drive(head, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))
    assert "nodes 1" in drive(None, tmp_path, RAY_ADDRESS=head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "refuses the token, which is missing or wrong"),
        ({"RAY_AUTH_MODE": "token"}, "needs a token, and there is none"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "needs a token, and there is none"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG}, "refuses the token, which is missing or wrong"),
    ],
)
def test_others_are_told_what_to_do(head, tmp_path, environment, message):
    output = drive(head, tmp_path, **environment)
    assert message in output
    assert all(
        name in output for name in ("ResourceError", head, "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH")
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_local_ray_works_in_both_modes(tmp_path):
    assert "nodes 1" in drive("local", tmp_path, RAY_AUTH_MODE="disabled")
    assert "nodes 1" in drive("local", tmp_path)
