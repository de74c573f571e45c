"""What is checked before a job is sent, how it is followed, what its end means; on dashboards made here."""

import io
import json
import logging
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from ray._private.runtime_env.packaging import create_package
from ray.dashboard.modules.job.pydantic_models import JobDetails

from acsr_ray.cli import run_job
from acsr_ray.config import ConfigError, FailedError, ResumableStop, parse_job
from acsr_ray.distributed import following, joining, submit, upload
from acsr_ray.distributed.dashboard import DEFAULT_ADDRESS, SubmitError, find_address, open_dashboard
from acsr_ray.distributed.following import Asked, JobInterruptedError, asked_to_stop, conclusion, follow
from acsr_ray.distributed.joining import UnsafeEnvironmentError
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.stop_jobs import stop_jobs
from acsr_ray.distributed.submit import SubmitSettings
from acsr_ray.distributed.upload import STOP_WAIT, check_upload, job_environment, measure_upload

LOG = "".join(f"line {number}\n" for number in range(40))


class Cluster:
    """A dashboard that plays a part; its jobs end as they are told."""

    def __init__(self):
        self.mode, self.ray, self.python = "disabled", ray.__version__, "3.11.9"
        self.answers = {}
        self.posts = []
        self.jobs = {}
        self.ends = [("SUCCEEDED", 0)]
        self.refusals = []
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                cluster.answer(self, cluster.get(self.path))

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                cluster.answer(self, cluster.post(self.path, json.loads(body or b"{}")))

            def log_message(self, *args):
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def answer(handler, reply):
        status, body = reply if isinstance(reply, tuple) else (200, reply)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def get(self, path):
        if path in self.answers:
            return self.answers[path]
        if path == "/api/authentication_mode":
            return {"authentication_mode": self.mode}
        if path == "/api/version":
            return {"version": "4", "ray_version": self.ray, "ray_commit": "x", "session_name": "x"}
        if path == "/api/v0/cluster_metadata":
            return {"result": True, "msg": "", "data": {"pythonVersion": self.python}}
        name = path.removeprefix("/api/jobs/")
        if not name:
            return list(self.jobs.values())
        if name.endswith("/logs"):
            return {"logs": LOG}
        # No live log: a proxy that lets no websocket through.
        return self.jobs.get(name, (404, b"no such thing"))

    def post(self, path, body):
        self.posts.append((path, body))
        if path == "/api/jobs/":
            name = body["submission_id"]
            if self.refusals:
                status, text, taken = self.refusals.pop(0)
                if taken:
                    self.jobs[name] = details(name, *self.ends.pop(0))
                return status, text
            status, code = self.ends.pop(0)
            self.jobs[name] = details(name, status, code)
            return {"job_id": name, "submission_id": name}
        name = path.split("/")[3]
        self.jobs[name] = details(name, "STOPPED", None)
        return {"stopped": True}


def details(name, status, code=None, kind=None):
    return {
        "type": "SUBMISSION",
        "submission_id": name,
        "status": status,
        "entrypoint": "x",
        "driver_exit_code": code,
        "error_type": kind,
    }


@pytest.fixture
def cluster(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(following, "POLL_S", 0.05)
    started = Cluster()
    yield started
    started.server.shutdown()


def settings(cluster, *arguments, **fields):
    return SubmitSettings(address=cluster.address, arguments=arguments, retry_wait_s=0, **fields)


def test_an_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert find_address(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert find_address(None) == "http://head:8265"
    assert find_address("other:8265") == "http://other:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://ray.example.com/")
    assert find_address(None) == "https://ray.example.com"
    assert find_address("http://other:1") == "http://other:1"


@pytest.mark.parametrize("head", ["127.0.0.1:9", "127.0.0.1:99999", "no port"])
def test_a_head_that_does_not_answer(monkeypatch, head):
    """KubeRay's RAY_ADDRESS is the head's own port, which is asked for the dashboard."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 0.2)
    monkeypatch.setenv("RAY_ADDRESS", head)
    with pytest.raises(SubmitError, match=f"RAY_ADDRESS={head} .*http://HOST:8265"):
        find_address(None)


@pytest.mark.parametrize("address", ["ray://head:10001", "file:///etc/passwd", "http://", "auto://"])
def test_what_is_no_dashboard(address):
    with pytest.raises(SubmitError, match="HOST:8265"):
        find_address(address)
    with pytest.raises(SubmitError, match="holds credentials") as caught:
        find_address("http://me:hush@head:8265")
    assert "hush" not in str(caught.value)


def test_the_address_that_was_given_wins(cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert open_dashboard(cluster.address).client.get_address() == cluster.address
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


def test_what_the_cluster_says_of_itself(cluster, caplog):
    found = open_dashboard(cluster.address)
    assert (found.authentication, found.ray_version, found.python_version) == (
        "disabled",
        ray.__version__,
        "3.11.9",
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_nothing_answers():
    with pytest.raises(SubmitError, match=r"no dashboard answers at http://127\.0\.0\.1:9 .*port forwarded"):
        open_dashboard("http://127.0.0.1:9")


@pytest.mark.parametrize("answer", [(404, b""), (200, b"<html>"), (200, b"[]"), (200, b"{}"), (500, b"")])
def test_something_else_answers(cluster, answer):
    cluster.answers["/api/authentication_mode"] = answer
    with pytest.raises(SubmitError, match="is no dashboard of Ray"):
        open_dashboard(cluster.address)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "needs a token, and there is none"), (403, "refuses the token")]
)
def test_a_token_that_is_missing_or_wrong(cluster, status, message):
    cluster.mode = "token"
    cluster.answers["/api/version"] = (status, b"Unauthorized")
    with pytest.raises(SubmitError, match=f"{message}: set RAY_AUTH_MODE=token") as caught:
        open_dashboard(cluster.address)
    assert caught.value.exit_code == 2


def test_old_clusters_and_others(cluster, caplog):
    cluster.ray = "2.59.0"
    with pytest.raises(UnsafeEnvironmentError, match=r"Ray 2\.59\.0"):
        open_dashboard(cluster.address)
    cluster.ray, cluster.python = "2.61.1", "3.12.4"
    open_dashboard(cluster.address)
    assert f"the cluster has Ray 2.61.1, this machine {ray.__version__}" in caplog.text
    assert "the cluster has Python 3.12.4, this machine 3." in caplog.text
    cluster.python = "3.10.1"
    with pytest.raises(SubmitError, match=r"Python 3\.10\.1"):
        open_dashboard(cluster.address)


@pytest.mark.parametrize(
    ("host", "mode", "variable", "warning"),
    [
        ("127.0.0.1", "disabled", "", None),
        ("127.0.0.1", "disabled", "token", "lets everyone in"),
        ("head.example.com", "disabled", "", "lets everyone in"),
        ("head.example.com", "token", "token", "unencrypted"),
        ("127.0.0.1", "token", "token", None),
    ],
)
def test_doors_that_stand_open_are_warned_of(host, mode, variable, warning, monkeypatch, caplog):
    from acsr_ray.distributed.dashboard import _warn_of_open_doors

    monkeypatch.setenv("RAY_AUTH_MODE", variable)
    _warn_of_open_doors(f"http://{host}:8265", mode)
    assert (warning in caplog.text) if warning else not caplog.text


def test_what_follows_two_dashes_is_the_jobs(monkeypatch):
    job = ["--input", "a b", "--output", "c", "--no-keep-original", "--", "x"]
    parsed = parse_job(SubmitSettings, "submit", ["--detach", "--", *job])
    assert parsed.detach
    assert parsed.arguments == tuple(job)
    assert parse_job(SubmitSettings, "submit", []).arguments == ()
    with pytest.raises(SystemExit):
        parse_job(SubmitSettings, "submit", ["--input", "a"])


def test_a_settings_file_is_the_jobs(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("purify_corpus: {input: a, output: b}\n")
    with pytest.raises(SystemExit) as stop:
        parse_job(SubmitSettings, "submit", ["--config", str(path)])
    assert stop.value.code == 2
    assert "put --config after `--`" in capsys.readouterr().err
    passed_on = parse_job(SubmitSettings, "submit", ["--", "--config", str(path)]).arguments
    assert passed_on == ("--config", str(path))


def test_other_jobs_pass_nothing_on(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_job(PurifyCorpusSettings, "purify_corpus", ["--input", "a", "--", "--output", "b"])
    assert stop.value.code == 2
    assert "purify_corpus passes nothing on; leave `-- --output b` away" in capsys.readouterr().err


def test_a_job_is_sent_as_it_was_given(cluster, capsys):
    summary = submit.submit(settings(cluster, "--input", "a b", "--output", "$HOME; c"))
    (path, body), *rest = cluster.posts
    assert (path, rest) == ("/api/jobs/", [])
    command = "exec python -m acsr_ray.cli purify_corpus --input 'a b' --output '$HOME; c'"
    assert body["entrypoint"] == command
    # The job's own environment, which its supervisor shares.
    assert body["runtime_env"]["env_vars"] == {STOP_WAIT: "40"}
    assert "working_dir" not in body["runtime_env"]
    assert summary["status"] == "SUCCEEDED"
    assert summary["submission"] == body["submission_id"]
    shown = capsys.readouterr()
    assert shown.err == LOG, "without a live log, the whole log at the end; once"
    assert shown.out == ""


BUSY = (500, b"No available agent to submit job, please try again later.", False)


def test_a_busy_dashboard_is_asked_again(cluster, monkeypatch):
    monkeypatch.setattr(submit, "AGAIN_S", 0.01)
    cluster.refusals = [BUSY, BUSY]
    assert submit.submit(settings(cluster))["attempts"] == 1
    assert len({body["submission_id"] for _, body in cluster.posts}) == 1
    monkeypatch.setattr(submit, "BUSY_S", 0.05)
    cluster.refusals = [BUSY] * 100
    with pytest.raises(JobInterruptedError, match="No available agent"):
        submit.submit(settings(cluster))


def test_who_leaves_does_not_wait_for_a_busy_dashboard(cluster, monkeypatch):
    cluster.refusals = [BUSY] * 100
    began = time.monotonic()
    leaving = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    leaving.start()
    with pytest.raises(JobInterruptedError, match="try again later; submit it again"):
        submit.submit(settings(cluster, attempts=3))
    leaving.join()
    assert time.monotonic() - began < submit.BUSY_S / 2


def test_a_lost_answer_is_no_second_job(cluster, monkeypatch):
    monkeypatch.setattr(submit, "AGAIN_S", 0.01)
    cluster.refusals = [
        (502, b"bad gateway", True),
        (400, b"ValueError: Job with that id already exists", False),
    ]
    assert submit.submit(settings(cluster))["status"] == "SUCCEEDED"
    assert len(cluster.jobs) == 1


def test_a_job_that_is_refused(cluster):
    cluster.refusals = [(400, b"TypeError: no such field", False)]
    with pytest.raises(SubmitError, match=r"does not take the job: .*no such field"):
        submit.submit(settings(cluster))
    assert len(cluster.posts) == 1


@pytest.mark.parametrize("job", ["submit", "purify-corpsu", "x; rm"])
def test_unknown_jobs(cluster, job):
    with pytest.raises(ConfigError, match="unknown job"):
        submit.submit(settings(cluster, job=job))
    assert cluster.posts == []


def test_another_attempt_after_75(cluster, caplog):
    cluster.ends = [("FAILED", 75), ("FAILED", -9), ("SUCCEEDED", 0)]
    summary = submit.submit(settings(cluster, attempts=3))
    assert summary["attempts"] == 3
    assert len({body["submission_id"] for _, body in cluster.posts}) == 3
    assert "attempt 1 of 3" in caplog.text
    cluster.ends = [("FAILED", 75)] * 2
    with pytest.raises(JobInterruptedError) as caught:
        submit.submit(settings(cluster, attempts=2))
    assert caught.value.exit_code == 75
    assert cluster.ends == []


@pytest.mark.parametrize(("end", "code"), [(("FAILED", 2), 2), (("FAILED", 1), 1), (("STOPPED", None), 75)])
def test_no_other_attempt_after_anything_else(cluster, end, code):
    cluster.ends = [end, ("SUCCEEDED", 0)]
    with pytest.raises((SubmitError, FailedError, ResumableStop)) as caught:
        submit.submit(settings(cluster, attempts=3))
    assert caught.value.exit_code == code
    assert len(cluster.posts) == 1


@pytest.mark.parametrize(
    ("status", "code", "kind", "error", "message"),
    [
        ("STOPPED", None, None, ResumableStop, "goes on when it is submitted again"),
        ("FAILED", 75, "JOB_ENTRYPOINT_COMMAND_ERROR", JobInterruptedError, "exit code 75"),
        ("FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR", SubmitError, "exit code 2"),
        ("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR", FailedError, "exit code 1"),
        ("FAILED", 3, "JOB_ENTRYPOINT_COMMAND_ERROR", FailedError, "exit code 3"),
        ("FAILED", -15, "JOB_ENTRYPOINT_COMMAND_ERROR", JobInterruptedError, "signal 15"),
        ("FAILED", 137, "JOB_ENTRYPOINT_COMMAND_ERROR", JobInterruptedError, "signal 9"),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", JobInterruptedError, "JOB_SUPERVISOR_ACTOR_DIED"),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", SubmitError, "cannot be set up"),
    ],
)
def test_what_an_end_means(status, code, kind, error, message):
    found = conclusion(JobDetails(**details("job-1", status, code, kind)))
    assert type(found) is error
    assert message in str(found)
    assert "job-1" in str(found)


def test_a_job_that_is_done():
    assert conclusion(JobDetails(**details("job-1", "SUCCEEDED", 0))) is None


def test_a_cluster_that_forgot_the_job(cluster):
    client = open_dashboard(cluster.address).client
    with pytest.raises(JobInterruptedError, match="does not know the job"):
        follow(client, "gone", 40, Asked())


def test_a_dashboard_that_goes_and_comes(cluster, monkeypatch):
    client = open_dashboard(cluster.address).client
    cluster.jobs["job"] = details("job", "RUNNING")
    cluster.answers["/api/jobs/job"] = (503, b"busy")
    threading.Timer(0.5, lambda: cluster.answers.pop("/api/jobs/job")).start()
    threading.Timer(0.8, lambda: cluster.jobs.update(job=details("job", "SUCCEEDED", 0))).start()
    assert follow(client, "job", 40, Asked()).driver_exit_code == 0
    cluster.answers["/api/jobs/job"] = (503, b"busy")
    monkeypatch.setattr(following, "PATIENCE_S", 0.5)
    with pytest.raises(JobInterruptedError, match="has not answered"):
        follow(client, "job", 40, Asked())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_job(cluster, number):
    client = open_dashboard(cluster.address).client
    cluster.jobs["job"] = details("job", "RUNNING")
    before = signal.getsignal(number)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), number)).start()
    with asked_to_stop() as asked:
        ended = follow(client, "job", 40, asked)
    assert ended.status == "STOPPED"
    assert [path for path, _ in cluster.posts] == ["/api/jobs/job/stop"]
    assert signal.getsignal(number) is before


def test_a_job_that_does_not_end(cluster, monkeypatch):
    client = open_dashboard(cluster.address).client
    cluster.jobs["job"] = cluster.answers["/api/jobs/job"] = details("job", "RUNNING")
    monkeypatch.setattr(following, "STOP_MARGIN_S", 0.2)
    asked = Asked()
    asked.is_made = True
    with pytest.raises(FailedError, match="does not end although it was stopped"):
        follow(client, "job", 0, asked)
    assert len(cluster.posts) == 1


def test_a_second_signal_leaves():
    with asked_to_stop() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        asked.wait(5)
        assert asked.is_made
        with pytest.raises(ResumableStop, match="left while"):
            os.kill(os.getpid(), signal.SIGINT)


class Halting:
    """A client whose live log breaks off in the middle of a line, again and again."""

    def __init__(self):
        self.connections = 0

    async def tail_job_logs(self, name):
        self.connections += 1
        for start in range(0, min(len(LOG), 50 * self.connections), 7):
            yield LOG[start : start + 7]
        raise RuntimeError("closed unexpectedly")

    def get_job_logs(self, name):
        return LOG


def test_a_log_that_breaks_off_is_shown_once(monkeypatch):
    monkeypatch.setattr(following, "POLL_S", 0.01)
    stream, client = io.StringIO(), Halting()
    tail = following.LogTail(client, "job", stream)
    while client.connections < 3:
        time.sleep(0.01)
    tail.finish()
    assert stream.getvalue() == LOG


def test_left_at_once(cluster, capsys):
    summary = submit.submit(settings(cluster, detach=True))
    assert summary["status"] == "SUBMITTED"
    assert capsys.readouterr().err == ""


def test_the_exit_code_is_the_jobs(cluster, capsys):
    cluster.ends = [("FAILED", 75)]
    with pytest.raises(SystemExit) as stop:
        run_job("submit", ["--address", cluster.address, "--", "--input", "a"])
    assert stop.value.code == 75
    assert "error: acsr-purify-corpus-" in capsys.readouterr().err


def test_a_head_that_goes_stops_what_runs(cluster):
    for status in ("RUNNING", "SUCCEEDED", "PENDING", "FAILED"):
        cluster.jobs[status] = details(status, status)
    assert stop_jobs(cluster.address, 5) == []
    assert [path for path, _ in cluster.posts] == ["/api/jobs/RUNNING/stop", "/api/jobs/PENDING/stop"]
    cluster.answers["/api/jobs/"] = [details("stubborn", "RUNNING")]
    assert stop_jobs(cluster.address, 0) == ["stubborn"]


@pytest.fixture
def clone(tmp_path):
    """A folder with things to send, and things to leave."""
    root = tmp_path / "clone"
    sizes = {
        "code/ä.py": 100,
        "code/large.bin": 3000,
        "notes.log": 500,
        "code/own.log": 400,
        "data/set.bin": 5000,
        "private/x": 7,
        "empty.txt": 0,
        ".git/objects/1": 9000,
        "venv/lib": 9000,
    }
    for name, size in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    (root / ".gitignore").write_text("*.log\n/data/\n")
    (root / "code/.gitignore").write_text("!nothing\n")
    (root / ".rayignore").write_text("private\n")
    return root


def test_an_upload_is_measured_as_ray_sends_it(clone, tmp_path, monkeypatch):
    for number, excludes in enumerate(([], ["code/large.bin"])):
        found = measure_upload(clone, excludes)
        package = tmp_path / f"{number}.zip"
        rules = [*upload.ray_constants.get_runtime_env_default_excludes(), *excludes]
        create_package(str(clone), package, include_gitignore=True, excludes=rules)
        assert found.package_bytes == package.stat().st_size
    names = [name for _, name in measure_upload(clone, []).files]
    assert names == [
        "code/large.bin",
        "code/ä.py",
        ".gitignore",
        "code/.gitignore",
        ".rayignore",
        "empty.txt",
    ]
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert "data/set.bin" in [name for _, name in measure_upload(clone, []).files]


def test_an_upload_that_is_too_large_names_the_largest_files(clone, monkeypatch, cluster):
    monkeypatch.setattr(upload, "GCS_STORAGE_MAX_SIZE", 3500)
    with pytest.raises(SubmitError, match=r"largest: code/large\.bin \(0\.0 MiB\), code/ä\.py"):
        submit.submit(settings(cluster, working_dir=str(clone)))
    assert cluster.posts == []
    assert check_upload(clone, ["large.bin"]).files[0] == (100, "code/ä.py")


def test_modules_are_measured_as_ray_sends_them(clone, tmp_path):
    for number, excludes in enumerate(([], ["large.bin"])):
        package = tmp_path / f"{number}.zip"
        create_package(
            str(clone), package, include_gitignore=True, include_parent_dir=True, excludes=excludes
        )
        assert measure_upload(clone, excludes, is_module=True).package_bytes == package.stat().st_size


@pytest.mark.parametrize("name", ["clone", "clone/code/ä.py", "x-1.0-py3-none-any.whl"])
def test_a_module_that_is_too_large(clone, tmp_path, monkeypatch, cluster, name):
    (tmp_path / "x-1.0-py3-none-any.whl").write_bytes(b"x" * 100)
    path = tmp_path / "env.yaml"
    path.write_text(f"py_modules: ['s3://bucket/code.zip', '{tmp_path}/{name}']\n")
    assert job_environment(path, None, (), 40)["py_modules"][1] == f"{tmp_path}/{name}"
    monkeypatch.setattr(upload, "GCS_STORAGE_MAX_SIZE", 150)
    with pytest.raises(SubmitError, match=f"py_modules: .*{name} has .* and Ray takes"):
        submit.submit(settings(cluster, runtime_env=path))
    assert cluster.posts == []


def test_what_is_no_module(tmp_path):
    path = tmp_path / "env.yaml"
    (tmp_path / "x.txt").write_text("x")
    path.write_text(f"py_modules: ['{tmp_path}/x.txt']\n")
    with pytest.raises(SubmitError, match="txt is neither a directory nor"):
        job_environment(path, None, (), 40)


def test_a_clone_of_this_repository_can_be_sent():
    root = upload.Path(__file__).parents[2]
    assert check_upload(root, []).package_bytes < 2**20 * 50


def test_an_archive_elsewhere_is_passed_on():
    uri = "s3://bucket/code.zip"
    assert job_environment(None, uri, (), 31) == {"working_dir": uri, "env_vars": {STOP_WAIT: "31"}}
    with pytest.raises(SubmitError, match="is no directory"):
        job_environment(None, "/nowhere", (), 31)


def test_an_environment_of_ones_own(tmp_path):
    path = tmp_path / "env.yaml"
    path.write_text(
        "env_vars: {AWS_ENDPOINT_URL: 'http://s3', RAY_AUTH_TOKEN_PATH: /run/t, N: '3'}\npip: [x]\n"
    )
    found = job_environment(path, None, ("*.bin",), 40)
    assert found["env_vars"] == {
        STOP_WAIT: "40",
        "AWS_ENDPOINT_URL": "http://s3",
        "RAY_AUTH_TOKEN_PATH": "/run/t",
        "N": "3",
    }
    assert found["pip"] == ["x"]
    assert found["excludes"] == ["*.bin"]


@pytest.mark.parametrize(
    "name", ["RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "api_key"]
)
def test_secrets_are_not_sent(tmp_path, name):
    path = tmp_path / "env.yaml"
    path.write_text(f"env_vars: {{{name}: hush}}\n")
    with pytest.raises(SubmitError, match=f"can read {name} there") as caught:
        job_environment(path, None, (), 40)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- x", "env_vars: [1]", "env_vars: {A: 1}", "working_dir: 3"])
def test_environments_that_cannot_be(tmp_path, text):
    path = tmp_path / "env.yaml"
    path.write_text(text)
    with pytest.raises(SubmitError):
        job_environment(path, None, (), 40)
