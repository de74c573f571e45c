"""Jobs on a cluster of their own: submitted by its dashboard, stopped, killed, submitted again.

Rows 29 and 31 of the fault matrix: `ray job stop` itself, with and without a token.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from acsr_ray.corpus.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DRIVERS = Path(__file__).parent / "drivers"
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"
WRONG = "ffffffffffffffffffffffffffffffff"
UNITS = 12
MODES = ("token", "disabled")


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]


@dataclass(frozen=True)
class Head:
    """A head with a dashboard."""

    address: str
    own_address: str
    """HOST:PORT of the head itself, as KubeRay puts it into RAY_ADDRESS."""
    folder: Path
    environment: dict[str, str]
    """Of who is let in."""
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, *command: object, **changes: str) -> "subprocess.Popen[str]":
        """Start a program of this environment; its output is one text."""
        process = subprocess.Popen(
            [BIN / str(command[0]), *map(str, command[1:])],
            env={**self.environment, **changes},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Not the clone that the tests are in: what runs is what was sent, or what is installed.
            cwd=self.folder,
        )
        self.processes.append(process)
        return process

    def submit(self, *options: object, job: list[object]) -> "subprocess.Popen[str]":
        program = [sys.executable, "-m", "acsr_ray.cli", "submit", "--address", self.address]
        return self.start(*program, *options, "--", *job)

    def ray(self, *arguments: object) -> str:
        process = self.start("ray", *arguments)
        told, _ = process.communicate(timeout=240)
        assert process.returncode == 0, told
        return told

    def running(self) -> list[str]:
        """Return the jobs that run."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            jobs = json.load(reply)
        return [job["submission_id"] for job in jobs if job["submission_id"] and job["status"] == "RUNNING"]

    def submission(self) -> str:
        """Return the one job that runs."""
        (name,) = self.running()
        return name

    def clear(self) -> None:
        """End what a test that failed has left."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.processes.clear()
        for name in self.running():
            self.ray("job", "stop", "--address", self.address, name)


def free_environment() -> dict[str, str]:
    """Return this environment without what Ray would take from it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    path = os.pathsep.join([str(BIN), clean["PATH"]])
    return {
        **clean,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def start_head(mode: str, log: Path) -> Iterator[Head]:
    """Start a head in a process group of its own, which ends with it."""
    environment = free_environment() | {"HOME": str(log.parent)}
    if mode == "token":
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    # All of them, or a head beside this one takes a port, and Ray ends with the process that wanted it.
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("ray-client-server-port",)
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    # Ray puts sockets there, whose paths may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="acsr-"))
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}/r"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--dashboard-host=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True, cwd=folder
        )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        ends = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api/authentication_mode", timeout=10).close()
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.2)
        yield Head(address, f"127.0.0.1:{ports['port']}", folder, environment)
    finally:
        # The group that it leads; asked to end, Ray waits for its children for longer than a test should.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Return a function that gives the head of a mode, started when it is asked for first."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Head] = {}

        def give(mode: str) -> Head:
            if mode not in started:
                log = tmp_path_factory.mktemp(mode) / "log"
                started[mode] = stack.enter_context(start_head(mode, log))
            return started[mode]

        yield give


@pytest.fixture(params=MODES)
def head(request, heads):
    yield heads(request.param)
    heads(request.param).clear()


@pytest.fixture
def open_head(heads):
    yield heads("disabled")
    heads("disabled").clear()


@pytest.fixture
def closed_head(heads):
    yield heads("token")
    heads("token").clear()


@pytest.fixture
def slow(tmp_path):
    """Return a function that writes a runtime environment in which each unit takes so many seconds longer."""

    def write(seconds: float, **more: str) -> Path:
        variables = {
            "PYTHONPATH": f"{DRIVERS}{os.pathsep}{ROOT}",
            "ACSR_FAULTS": json.dumps({"slow": {"PurifyImages": seconds}}),
            **more,
        }
        path = tmp_path / "slow.yaml"
        path.write_text(yaml.safe_dump({"worker_process_setup_hook": "hooks.install", "env_vars": variables}))
        return path

    return write


def purification(corpus, output, bundle):
    return ["--input", corpus, "--output", output, "--bundle", bundle, "--unit-rows", 25, "--ray.actors", 1]


def driver_of(output):
    """Return the process that purifies into an output."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if {"acsr_ray.cli", "purify_corpus", str(output)} <= set(command) and "--" not in command:
                found.append(process)
    assert len(found) == 1, found
    return found[0]


def until(process, condition, seconds=240):
    """Wait until something holds, while a process lives."""
    ends = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"it ended first ({process.returncode}):\n{process.stdout.read()}")
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.05)


def published(output):
    return Ledger(str(output)).published()


def finish(head, corpus, output, bundle, oracle, *options):
    """Submit again, without faults, and check that the output is that of a fault-free run."""
    process = head.submit(*options, job=purification(corpus, output, bundle))
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert "purify_corpus: done in" in told, "the job's own log is shown"
    oracle.check(output)
    return told


def check_no_token(head, *texts):
    """Check that the token is in no output and in no file that Ray has written."""
    for text in texts:
        assert TOKEN not in text
    logs = [path for path in (head.folder / "r").rglob("*") if path.is_file() and "logs" in path.parts]
    assert len(logs) > 10
    assert [path for path in logs if TOKEN.encode() in path.read_bytes()] == []


def test_stopped_in_the_middle_and_submitted_again(head, corpus, tiny_bundle, oracle, slow, tmp_path):
    """Row 29: SIGTERM, and the time that the submission asked for."""
    output = tmp_path / "out"
    job = purification(corpus, output, tiny_bundle)
    process = head.submit("--runtime-env", slow(1.0), job=job)
    until(process, lambda: len(published(output)) >= 2)
    began = time.monotonic()
    stopped = head.ray("job", "stop", "--address", head.address, head.submission())
    assert time.monotonic() - began < 40
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "error: stopped on request; the same command goes on from here" in told, "the driver's own end"
    assert "was stopped; a stopped job goes on when it is submitted again" in told
    done = published(output)
    assert 2 <= len(done) < UNITS
    assert Ledger(str(output)).snapshot().names() == done, "what was published is in a snapshot"
    # The second time with the code of this clone, as `--working-dir .` sends it.
    options = ["--working-dir", ROOT, "--exclude", "tests/"]
    again = finish(head, corpus, output, tiny_bundle, oracle, *options)
    assert f"{300 - 25 * len(done)} images in" in again
    check_no_token(head, told, stopped, again)


def test_without_the_variable_a_stop_kills_and_resubmission_resumes(
    open_head, corpus, tiny_bundle, oracle, slow, tmp_path
):
    """Row 29: Ray's default, SIGKILL 3 s after SIGTERM."""
    output = tmp_path / "out"
    job = purification(corpus, output, tiny_bundle)
    # Units that take longer than Ray waits.
    plain = json.dumps(yaml.safe_load(slow(6.0).read_text()))
    program = ["python", "-m", "acsr_ray.cli", "purify_corpus"]
    options = ["--address", open_head.address, "--runtime-env-json", plain, "--submission-id", "plain"]
    process = open_head.start("ray", "job", "submit", *options, "--", *program, *job)
    until(process, lambda: len(published(output)) >= 1)
    driver = driver_of(output)
    began = time.monotonic()
    open_head.ray("job", "stop", "--address", open_head.address, "plain")
    driver.wait(20)
    assert time.monotonic() - began < 20
    told, _ = process.communicate(timeout=60)
    assert "asked to stop: finishing and publishing what is begun" in told
    assert "goes on from here" not in told, "it was killed before it came to that"
    supervisor = (open_head.folder / "r/session_latest/logs/jobs/supervisor-plain.log").read_text()
    assert "has timed out after 3 seconds. Job is now being force-killed with SIGKILL" in supervisor
    assert len(published(output)) < UNITS
    finish(open_head, corpus, output, tiny_bundle, oracle)


def test_a_killed_driver_is_another_attempt(open_head, corpus, tiny_bundle, oracle, slow, tmp_path):
    output = tmp_path / "out"
    options = ["--attempts", 2, "--retry-wait-s", 0, "--runtime-env", slow(0.5)]
    process = open_head.submit(*options, job=purification(corpus, output, tiny_bundle))
    until(process, lambda: len(published(output)) >= 2)
    driver_of(output).kill()
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert "attempt 1 of 2" in told
    assert "was killed by signal 9" in told
    oracle.check(output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_leaves_the_submission_stops_the_job(
    open_head, corpus, tiny_bundle, oracle, slow, tmp_path, number
):
    output = tmp_path / "out"
    options = ["--attempts", 3, "--runtime-env", slow(1.0)]
    process = open_head.submit(*options, job=purification(corpus, output, tiny_bundle))
    until(process, lambda: len(published(output)) >= 1)
    driver = driver_of(output)
    process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "goes on from here" in told
    assert "attempt 2" not in told
    assert not driver.is_running()
    assert Ledger(str(output)).snapshot().names() == published(output)
    if number == signal.SIGINT:
        finish(open_head, corpus, output, tiny_bundle, oracle)


def test_a_head_that_goes_stops_its_jobs_first(open_head, corpus, tiny_bundle, slow, tmp_path):
    """What a head's pod runs before it ends."""
    output = tmp_path / "out"
    options = ["--detach", "--runtime-env", slow(1.0)]
    process = open_head.submit(*options, job=purification(corpus, output, tiny_bundle))
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    ends = time.monotonic() + 240
    while not published(output):
        assert time.monotonic() < ends
        time.sleep(0.1)
    driver = driver_of(output)
    program = [sys.executable, "-m", "acsr_ray.distributed.stop_jobs", "45"]
    stopping = open_head.start(*program, RAY_ADDRESS=open_head.own_address)
    told, _ = stopping.communicate(timeout=120)
    assert stopping.returncode == 0, told
    assert not driver.is_running()
    assert Ledger(str(output)).snapshot().names() == published(output)


def test_the_job_says_what_was_wrong(open_head, tmp_path):
    process = open_head.submit(job=["--input", "/nowhere", "--output", tmp_path / "out"])
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 2, told
    assert "error: input /nowhere does not exist" in told
    assert "exit code 2" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "needs a token, and there is none"),
        ({"RAY_AUTH_TOKEN": ""}, "needs a token, and there is none"),
        ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "needs a token, and there is none"),
        ({"RAY_AUTH_TOKEN": WRONG}, "refuses the token"),
    ],
)
def test_row_31_without_the_token_nobody_gets_in(closed_head, tmp_path, changes, message):
    program = [sys.executable, "-m", "acsr_ray.cli", "submit", "--address", closed_head.address]
    process = closed_head.start(*program, "--", "--input", "in", "--output", "out", **changes)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert message in told
    assert "RAY_AUTH_MODE=token" in told
    assert "Traceback" not in told
    assert WRONG not in told
    check_no_token(closed_head, told)
