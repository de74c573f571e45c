"""The console script: verbs before jobs, one JSON object for programs, and the exit codes that help tells."""

import json
import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest

from acsr_ray import cli
from acsr_ray.config import JOBS, FailedError, JobSettings, ResumableStop, parse_job


class EchoSettings(JobSettings):
    """Say what it is told."""

    word: str = "hello"
    """What to say."""
    deed: str = ""
    """How to end."""


class LineSettings(EchoSettings):
    """Say it in one line."""

    def render(self, summary: Mapping[str, Any]) -> str:
        return f"said {summary['word']}"


def echo(settings: EchoSettings) -> dict[str, Any]:
    """Print, log, and end as told."""
    print("noise on the way")
    logging.getLogger(__name__).warning("a word to the log")
    errors = {"stop": ResumableStop("later"), "fail": FailedError("broken"), "bug": RuntimeError("odd")}
    if settings.deed == "interrupt":
        raise KeyboardInterrupt
    if settings.deed in errors:
        raise errors[settings.deed]
    if settings.deed == "part":
        partly = FailedError("one of two")
        partly.summary = {"word": settings.word}
        raise partly
    summary: dict[str, Any] = {"word": settings.word, "rate": float("inf"), "names": ("a", "b")}
    return summary | ({"error": "not well", "exit_code": 1} if settings.deed == "unwell" else {})


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the console script with two verbs of this file; return exit code, stdout and stderr."""
    rows = {"echo": (__name__, "EchoSettings", "echo"), "line": (__name__, "LineSettings", "echo")}
    monkeypatch.setattr(cli, "ENTRY_POINTS", {**cli.ENTRY_POINTS, **rows})

    def start(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["acsr-ray", *args])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return start


def test_help_shows_verbs_first_with_a_line_each(run):
    code, out, _ = run("--help")
    lines = out.splitlines()
    assert code == 0
    at = {name: next(i for i, line in enumerate(lines) if line.startswith(f"  {name} ")) for name in names()}
    assert list(at) == sorted(at, key=at.__getitem__)
    assert all(len(lines[row].split(maxsplit=1)[1]) > 20 for row in at.values())
    assert "75 stopped cleanly" in out


def names():
    return [name.replace("_", "-") for name in (*cli.VERBS, *JOBS)]


def test_verbs_are_in_the_order_of_the_work():
    order = ["plan", "purify", "status", "retry", "verify", "report", "doctor", "submit"]
    assert [verb for verb in order if verb in cli.VERBS] == list(cli.VERBS)


@pytest.mark.parametrize("verb", ["plan", "purify", "status", "retry", "verify", "report", "doctor"])
def test_verbs_read_the_section_of_the_purification(tmp_path, verb):
    path = tmp_path / "run.yaml"
    path.write_text(f"purify_corpus: {{output: '{tmp_path}/out'}}\n")
    module, settings, _ = cli.ENTRY_POINTS[verb]
    parsed = parse_job(getattr(import_module(module), settings), verb, ["--config", str(path)])
    assert parsed.output == f"{tmp_path}/out"


def test_people_see_a_summary(run):
    code, out, err = run("echo", "--word", "x")
    assert (code, err.count("error")) == (0, 0)
    assert "echo: done in" in out
    assert '  names                ["a", "b"]' in out
    assert run("line", "--word", "x")[1].endswith("said x\n")


def test_people_see_what_was_done_before_what_was_not(run):
    code, out, err = run("echo", "--word", "x", "--deed=part")
    assert (code, err.splitlines()[-1]) == (1, "error: one of two")
    assert "echo: failed after" in out
    assert "  word                 x" in out
    assert run("line", "--word", "x", "--deed=part")[1].endswith("said x\n")


@pytest.mark.parametrize(
    ("deed", "code", "content"),
    [
        ("", 0, {"word": "x", "rate": None, "names": ["a", "b"]}),
        ("unwell", 1, {"word": "x", "rate": None, "names": ["a", "b"], "error": "not well", "exit_code": 1}),
        ("stop", 75, {"error": "later", "exit_code": 75}),
        ("fail", 1, {"error": "broken", "exit_code": 1}),
        ("part", 1, {"word": "x", "error": "one of two", "exit_code": 1}),
        ("interrupt", 130, {"error": "interrupted", "exit_code": 130}),
        ("bug", 1, {"error": "RuntimeError: odd", "exit_code": 1}),
    ],
)
def test_programs_get_one_object(run, deed, code, content):
    got, out, err = run("echo", "--json", "--word", "x", f"--deed={deed}")
    assert (got, json.loads(out)) == (code, content)
    assert "noise on the way" in err
    if deed != "bug":
        assert run("echo", "--word", "x", f"--deed={deed}")[0] == code
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["echo", "--wrod", "x"], "unknown option --wrod, did you mean '--word'?"),
        (["ehco"], "unknown verb or job 'ehco', did you mean 'echo'?"),
        (["purify", "--limit", "x"], "--limit"),
        (["echo", "--config", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
        (["status"], "--output is needed"),
    ],
)
def test_what_cannot_be_parsed_is_an_object_too(run, args, told):
    code, out, err = run(*args, "--json")
    content = json.loads(out)
    assert (code, content["exit_code"]) == (2, 2)
    assert told in content["error"]
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert told in err


def test_help_is_for_people_even_where_programs_ask(run):
    code, out, _ = run("echo", "--json", "--help")
    assert code == 0
    for text in ("--word", "What to say", "With --json", "Exit codes: 0 done"):
        assert text in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(run, verb):
    code, out, _ = run(verb, "--help")
    # What is submitted has its own options behind `--`.
    option = "--working-dir" if verb == "submit" else "--output"
    assert (code, f"usage: acsr-ray {verb}" in out, option in out) == (0, True, True)
