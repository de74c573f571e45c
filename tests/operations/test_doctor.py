"""Doctor: what is well is said to be, what is not is found before a night, and nothing is left behind."""

import errno
import os
import sys
import time

import pytest

from acsr_ray.cli import run_job
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.isolated import DecoderSettings
from acsr_ray.corpus.lease import Lease
from acsr_ray.distributed.joining import ResourceError
from acsr_ray.distributed.probe import ClusterView
from acsr_ray.filesystems import StorageSettings
from acsr_ray.operations import doctor, machine_checks, place_checks
from acsr_ray.operations.doctor import DoctorSettings, examine
from acsr_ray.operations.machine_checks import (
    check_bundle,
    check_decoder,
    check_extras,
    check_memory,
    check_python,
    check_requirements,
    check_unsafe,
)
from acsr_ray.operations.place_checks import check_cluster, check_input, check_output
from acsr_ray.storage import DiskStorage, open_storage


def levels(findings):
    return {finding.name: finding.level for finding in findings}


def test_a_machine_that_is_ready(source, tmp_path, tiny_bundle, capsys):
    settings = DoctorSettings(input=str(source), output=str(tmp_path / "a/out"), bundle=str(tiny_bundle))
    found = examine(settings)
    assert {check["level"] for check in found["checks"]} <= {"ok", "warn"}
    assert "exit_code" not in found
    names = [check["name"] for check in found["checks"]]
    for name in ("python", "packages", "unsafe switches", "bundle", "decoder", "output", "input", "cluster"):
        assert name in names
    # A probe leaves nothing behind, not even folders.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    with pytest.raises(SystemExit) as exit_info:
        run_job("doctor", ["--input", str(tmp_path / "none"), "--bundle", str(tiny_bundle)])
    assert exit_info.value.code == 1
    captured = capsys.readouterr()
    assert "fail  input" in captured.out
    assert "-> check --input" in captured.out
    assert "not ready: input" in captured.err


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10, 9), "fail"), ((3, 12, 1), "ok"), ((3, 14, 0), "warn")]
)
def test_python(version, level):
    assert check_python(version).level == level


def test_requirements(monkeypatch):
    assert levels(check_requirements()) == {"packages": "ok"}
    assert levels(check_requirements("no-such-package-here")) == {"packages": "warn"}
    asked = ["numpy>=99", "pillow>=1", "not-there>=1", "s3fs>=99; extra == 's3'"]
    monkeypatch.setattr(machine_checks, "requires", lambda package: asked)
    (finding,) = check_requirements()
    assert finding.level == "fail"
    assert "not-there is missing" in finding.told
    assert "numpy" in finding.told
    assert "s3fs" not in finding.told


def test_switches_that_let_data_run_code():
    assert check_unsafe({}).level == "ok"
    found = check_unsafe({"RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE": "1"})
    assert (found.level, "RAY_DATA_AUTOLOAD" in found.told) == ("fail", True)


def test_extras_that_a_location_needs(monkeypatch):
    assert levels(check_extras("s3://b/in", None)) == {"extras": "ok"}
    monkeypatch.setattr(machine_checks.importlib.util, "find_spec", lambda name: None)
    assert levels(check_extras("in", "out")) == {"extras": "ok"}
    missing, _ = check_extras("in", "s3://b/out")
    assert (missing.level, missing.hint) == ("fail", "pip install 'acsr-ray[s3]'")


def test_memory(monkeypatch, tmp_path):
    assert "CPUs" in check_memory(1).told
    monkeypatch.setattr(machine_checks, "SHARED_MEMORY", tmp_path)
    found = check_memory(10**9)
    assert (found.level, "--shm-size" in found.hint) == ("warn", True)


def test_a_bundle_that_was_changed(tmp_path, make_bundle):
    bundle = make_bundle(tmp_path / "bundle")
    assert check_bundle(str(bundle)).level == "ok"
    path = bundle / "dictionaries.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert check_bundle(str(bundle)).level == "fail"
    assert "no bundle 'none-such'" in check_bundle("none-such").told


def test_a_decoder_that_does_not_start(monkeypatch):
    assert check_decoder(DecodeLimits(), DecoderSettings()).level == "ok"
    command = (sys.executable, "-c", "raise SystemExit(3)")
    monkeypatch.setattr(machine_checks.IsolatedDecoder.__init__, "__defaults__", (DecoderSettings(), command))
    assert check_decoder(DecodeLimits(), DecoderSettings()).level == "fail"


def test_storage_that_replaces_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(DiskStorage, "create", lambda self, name, data: self.write(name, data) is None)
    (found,) = check_output(str(tmp_path / "out"), 0)
    assert (found.level, "was replaced" in found.told) == ("fail", True)


def test_storage_that_cannot_be_written(tmp_path, monkeypatch):
    def refused(self, data):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(DiskStorage, "_stage", refused)
    assert levels(check_output(str(tmp_path), 0)) == {"output": "fail"}
    assert levels(check_output("http://host/out", 0)) == {"output": "fail"}


def test_a_store_that_does_not_answer_is_told_soon(monkeypatch, tmp_path, tiny_bundle):
    # As long as a run would wait by default.
    monkeypatch.delenv("ACSR_STORAGE_DEADLINE_S", raising=False)
    monkeypatch.setattr(doctor, "DEADLINE_S", 0.1)
    # Nobody listens there.
    storage = StorageSettings(endpoint_url="http://127.0.0.1:9", region="eu-central-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    began = time.monotonic()
    found = examine(DoctorSettings(output="s3://corpus/out", bundle=str(tiny_bundle), storage=storage))
    assert time.monotonic() - began < 60
    (told,) = [check["told"] for check in found["checks"] if check["name"] == "output"]
    assert "writing s3://corpus/out/_acsr/probes/" in told


def test_what_failed_first_is_told_and_the_probe_goes_all_the_same(tmp_path, monkeypatch):
    def refused(self, name):
        raise PermissionError(errno.EACCES, "Permission denied", name)

    def garbled(self, name):
        raise OSError(errno.ENXIO, "No such device", name)

    monkeypatch.setattr(DiskStorage, "read", garbled)
    (found,) = check_output(str(tmp_path), 0)
    assert (found.level, "No such device" in found.told) == ("fail", True)
    assert not any(tmp_path.rglob("*"))
    monkeypatch.setattr(DiskStorage, "remove", refused)
    (found,) = check_output(str(tmp_path), 0)
    assert "No such device" in found.told
    monkeypatch.undo()
    # What runs cannot remove is trouble too.
    monkeypatch.setattr(DiskStorage, "remove", refused)
    (found,) = check_output(str(tmp_path), 0)
    assert (found.level, "Permission denied" in found.told) == ("fail", True)


def test_room_and_a_run_under_way(tmp_path):
    output = str(tmp_path / "out")
    assert levels(check_output(output, 0)) == {"output": "ok", "free disk": "ok"}
    with Lease(open_storage(output)):
        found = levels(check_output(output, 10**9))
    assert found == {"output": "ok", "free disk": "fail", "lease": "warn"}


def test_storage_in_a_bucket(bucket):
    assert levels(check_output("s3://corpus/out", 10**9)) == {"output": "ok"}
    assert bucket.keys("") == []
    assert levels(check_output("s3://no-such-bucket/out", 0)) == {"output": "fail"}


def test_input(source, tmp_path):
    assert check_input(str(source), "image").told == "3 shards, the first with 10 rows"
    assert check_input(str(source), "picture").level == "fail"
    assert "does not exist" in check_input(str(tmp_path / "none"), "image").told
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"1")
    assert check_input(str(tmp_path / "photos"), "image").told == "a folder of 1 images"


@pytest.mark.parametrize(
    ("mode", "cpus", "level"),
    [("token", 4.0, "ok"), ("", 4.0, "warn"), ("disabled", 4.0, "warn"), ("token", 0.0, "fail")],
)
def test_cluster(monkeypatch, mode, cpus, level):
    view = ClusterView(2, {"CPU": cpus, "GPU": 1.0})
    monkeypatch.setattr(place_checks, "view_cluster", lambda address: view)
    monkeypatch.setitem(os.environ, "RAY_AUTH_MODE", mode)
    found = check_cluster("head:6379")
    assert (found.level, "2 nodes" in found.told) == (level, True)


def test_a_cluster_that_does_not_answer(monkeypatch):
    def refused(address):
        raise ResourceError(f"nothing answers at {address}")

    monkeypatch.setattr(place_checks, "view_cluster", refused)
    assert check_cluster("head:1").level == "fail"
    assert check_cluster(None).level == "ok"
