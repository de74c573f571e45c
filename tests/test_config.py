"""Settings: the files in jobs/configs, refusals that name the key, flags over file, YAML values."""

import importlib
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from acsr_ray.cli import ENTRY_POINTS, VERBS
from acsr_ray.config import (
    JOBS,
    ConfigError,
    Described,
    JobSettings,
    Settings,
    did_you_mean,
    last_value,
    load_section,
    parse_job,
)

CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.yaml"))
SECTION = "train_baseline"


class Inner(Settings):
    """Nested settings."""

    step_size: float = Field(0.5, gt=0)
    """A number."""
    nesterov: bool = True
    """A switch."""


class Job(JobSettings):
    """A job for these tests."""

    shards: tuple[str, ...] = ()
    """A list."""
    name: str | None = "default"
    """Text or nothing."""
    limit: int | None = Field(None, ge=1)
    """A number or nothing."""
    keep: bool = False
    """A switch."""
    mode: Literal["fast", "exact"] = "fast"
    """A choice."""
    output: Path = Path("out")
    """A path."""
    inner: Inner = Inner()
    """Nested."""


@pytest.fixture
def parse(tmp_path):
    """Parse `Job` from YAML text (None for no file) and flags."""

    def run(text: str | None, *flags: str) -> Job:
        if text is None:
            return parse_job(Job, SECTION, flags)
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return parse_job(Job, SECTION, ["--config", str(path), *flags])

    return run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    sections = yaml.safe_load(path.read_text())
    assert sections, f"{path} is empty"
    for section, values in sections.items():
        module, settings_name, function = ENTRY_POINTS[section]
        loaded = importlib.import_module(module)
        settings = parse_job(getattr(loaded, settings_name), section, ["--config", str(path)])
        assert callable(getattr(loaded, function))
        for key, value in values.items():
            got = settings.model_dump(mode="json")[key]
            if isinstance(value, dict):
                got = {name: got[name] for name in value}
            assert got == value, (section, key)


def test_there_are_shipped_configs():
    assert CONFIGS
    assert tuple(name for name in ENTRY_POINTS if name not in VERBS) == JOBS


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        ("train_baselin: {keep: true}", (), "did you mean 'train_baseline'"),
        (f"{SECTION}: {{shard: [a]}}", (), "did you mean 'shards'"),
        (f"{SECTION}: {{inner: {{stepsize: 1}}}}", (), "did you mean 'step_size'"),
        (None, ("--outptu", "x"), "did you mean '--output'"),
        (None, ("--inner.step-siz=1",), "did you mean '--inner.step-size'"),
        (f"{SECTION}: {{zzz: 1}}", (), "known: config, shards, name"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(parse, capsys, text, flags, named):
    with pytest.raises(SystemExit) as exit_info:
        parse(text, *flags)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        (f"{SECTION}: {{limit: 0}}", (), "limit"),
        (f"{SECTION}: {{limit: many}}", (), "limit"),
        (f"{SECTION}: {{inner: {{step_size: -1}}}}", (), "step_size"),
        (f"{SECTION}: {{inner: 3}}", (), "inner"),
        (f"{SECTION}: {{mode: slow}}", (), "mode"),
        (None, ("--mode", "slow"), "mode"),
        (None, ("--limit", "1.5"), "limit"),
    ],
)
def test_bad_values_exit_2_and_name_the_key(parse, capsys, text, flags, named):
    with pytest.raises(SystemExit) as exit_info:
        parse(text, *flags)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert named in (captured.err + captured.out).replace("-", "_")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("text", ["[1, 2]", "train_baseline: 3", "a: [", "just text"])
def test_files_that_are_not_settings_are_refused(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        load_section(path, SECTION)


@pytest.mark.parametrize(
    "content", [b"1: {a: 2}", b"train_baseline: {1: 2}", b"train_baseline: {name: \xff}"]
)
def test_odd_keys_and_bytes_exit_2(tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        parse_job(Job, SECTION, ["--config", str(path)])
    assert exit_info.value.code == 2


def test_missing_file_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        parse_job(Job, SECTION, ["--config", str(tmp_path / "no.yaml")])
    assert exit_info.value.code == 2
    assert "no.yaml does not exist" in capsys.readouterr().err


def test_a_section_of_another_job_is_read_by_who_names_it(tmp_path):
    class Verb(Job):
        """A verb about a job."""

        sections = (SECTION, "benchmark")

    path = tmp_path / "settings.yaml"
    path.write_text(f"{SECTION}: {{limit: 7, name: a}}\nbenchmark: {{name: b}}\n")
    settings = parse_job(Verb, "verb", ["--config", str(path)])
    assert (settings.limit, settings.name) == (7, "b")


def test_a_verb_with_few_settings_passes_over_the_others_of_a_section(tmp_path):
    class Few(JobSettings):
        """A verb that needs no more than the output."""

        sections = (SECTION,)
        borrows = True

        output: Path = Path("out")
        """A path."""

    path = tmp_path / "settings.yaml"
    path.write_text(f"{SECTION}: {{output: there, limit: 7}}\n")
    assert parse_job(Few, "verb", ["--config", str(path)]).output == Path("there")


def test_what_was_told_counts_as_set_and_nothing_else(parse):
    settings = parse(f"{SECTION}: {{limit: 2, keep: true}}", "--no-keep", "--inner.step_size=1")
    assert settings.model_fields_set - {"config"} == {"limit", "keep", "inner"}
    assert settings.model_dump(exclude_unset=True, exclude={"config"}) == {
        "limit": 2,
        "keep": False,
        "inner": {"step_size": 1.0},
    }
    assert (settings.mode, settings.inner.nesterov) == ("fast", True)
    assert parse(None).model_fields_set == set()


@pytest.mark.parametrize(
    ("flags", "value"),
    [([], None), (["--a", "1"], "1"), (["--a=1", "--a", "2"], "2"), (["--a"], None), (["--ab", "1"], None)],
)
def test_the_last_value_of_a_flag_counts(flags, value):
    assert last_value(flags, "--a") == value


def test_empty_file_and_other_sections_leave_the_defaults(parse):
    defaults = Job().model_dump(exclude={"config"})
    assert parse("").model_dump(exclude={"config"}) == defaults
    assert parse("purify_corpus: {limit: 3}").model_dump(exclude={"config"}) == defaults


def test_yaml_values(parse):
    settings = parse(
        f"{SECTION}:\n  shards: [a, b c]\n  name: null\n  limit: 7\n  keep: true\n  mode: exact\n"
        "  output: some/where\n  inner: {step_size: 1.0e-3, nesterov: false}\n"
    )
    assert settings.shards == ("a", "b c")
    assert settings.name is None
    assert settings.limit == 7
    assert settings.keep is True
    assert settings.mode == "exact"
    assert settings.output == Path("some/where")
    assert settings.inner == Inner(step_size=0.001, nesterov=False)


def test_yaml_false_null_and_empty_list_reach_the_defaults(parse):
    settings = parse(f"{SECTION}: {{shards: [], keep: false, limit: null}}")
    assert (settings.shards, settings.keep, settings.limit) == ((), False, None)


def test_a_list_left_empty_in_the_file_is_not_the_word_none(parse):
    """`shards:` with nothing behind it is null in YAML; refuse it or take it as no shards."""
    try:
        shards = parse(f"{SECTION}:\n  shards:\n").shards
    except SystemExit as refused:
        shards = refused.code
    assert shards in ((), 2)


def test_flags_override_the_file(parse):
    text = f"{SECTION}: {{shards: [a, b], limit: 7, keep: true, inner: {{step_size: 2, nesterov: true}}}}"
    flags = ("--shards", "c", "--no-keep", "--inner.no-nesterov", "--limit=9")
    settings = parse(text, *flags)
    assert settings.shards == ("c",)
    assert settings.keep is False
    assert settings.limit == 9
    assert settings.inner == Inner(step_size=2, nesterov=False)


def test_flags_take_underscores_too(parse):
    assert parse(None, "--inner.step_size", "3").inner.step_size == 3


def test_settings_are_frozen_and_closed():
    with pytest.raises(ValidationError, match="frozen"):
        Job().limit = 3
    with pytest.raises(ValidationError, match="limits"):
        Job(limits=3)


def test_help_shows_every_field_and_its_docstring(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_job(Job, SECTION, ["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--shards", "--limit", "--inner.step-size", "--config", "A job for these tests"):
        assert flag in shown


def test_suggestion_lists_all_when_nothing_is_near():
    assert did_you_mean("limt", ["limit", "name"]) == ", did you mean 'limit'?"
    assert did_you_mean("qqq", ["limit", "name"]) == "; known: limit, name"


def test_described_settings_round_trip_through_json():
    class Solver(Described):
        """Settings in a manifest."""

        atoms: tuple[int, ...] = (1, 2)
        rho: float | None = None

    solver = Solver(atoms=(3,), rho=0.25)
    assert solver.describe() == {"atoms": [3], "rho": 0.25}
    assert Solver.from_description(solver.describe()) == solver
    with pytest.raises(ValidationError):
        Solver.from_description({"rho": 1, "lmbda": 2})
