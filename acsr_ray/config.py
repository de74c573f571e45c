"""Typed, frozen settings: one pydantic model per job, read from a YAML section and overridden by flags.

A settings file has one section per job, named like the job (`train_baseline:`, `purify_corpus:`), so one
file describes a whole run. Flags given on the command line win over the file. An unknown key, in the
file or on the command line, is an error that suggests the nearest known one. Verbs that are about a
purification have no section of their own: they read that of `purify_corpus`.
"""

import difflib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, get_args

import tyro
import yaml
from pydantic import BaseModel, ConfigDict

Device = Literal["auto", "cpu", "cuda"]

JOBS = (
    "prepare_corpus",
    "train_baseline",
    "learn_semantics",
    "train_robust",
    "build_bundle",
    "make_bundle",
    "train_purifier",
    "train_target",
    "finetune_target",
    "calibrate_doubt",
    "train_defense",
    "compare_encoders",
    "compare_attacks",
    "sweep_attacks",
    "purify_corpus",
    "repurify_nightly",
    "benchmark",
)
"""Names of the jobs, which are the sections a settings file may have, in the order they run."""


class Settings(BaseModel):
    """Base of every settings object: frozen, unknown keys refused, field docstrings kept as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


NOT_DECIDING = {"config", "output", "ray", "run", "device", "max_in_flight"}
"""Settings of a job that do not change what it makes."""
RESOURCES = {"task_cpus", "task_gpus"}
"""The same, at any depth."""


class JobSettings(Settings):
    """Base of every job's and verb's settings: adds the settings file."""

    sections: ClassVar[tuple[str, ...]] = ()
    """Sections of a settings file that are read, the last one winning; empty: the one named like the job."""
    borrows: ClassVar[bool] = False
    """Whether keys of those sections that are settings of the job they belong to alone are passed over."""

    config: Path | None = None
    """YAML file with one section per job; flags given on the command line override it."""

    def render(self, summary: Mapping[str, Any]) -> str | None:
        """Return what people are shown of a summary; None: each key on a line of its own."""
        return None

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide what the job makes, as JSON values, for manifests."""
        return _without(self.model_dump(mode="json", exclude=NOT_DECIDING), RESOURCES)


def _without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in names
    }


class AcsrError(Exception):
    """Base of the errors a user can act on: jobs print their message alone and exit with `exit_code`."""

    exit_code: ClassVar[int] = 2
    """2: settings, input or environment that cannot work; the job would end like this again."""
    summary: Mapping[str, Any] | None = None
    """What the job has to tell all the same, where it did most of what it was asked for."""


class FailedError(AcsrError, RuntimeError):
    """A job that could not do all it was asked for; what it finished is kept."""

    exit_code = 1


class ResumableStop(AcsrError, RuntimeError):
    """A job that stopped cleanly before its end: the same command goes on from there."""

    exit_code = 75
    """EX_TEMPFAIL, which schedulers take for "try again"."""


class MissingExtraError(AcsrError, RuntimeError):
    """An optional dependency is not installed; the message says how to get it."""


class ConfigError(AcsrError, ValueError):
    """A settings file or flag that cannot be used; the message names the key."""


JobT = TypeVar("JobT", bound=JobSettings)
SettingsT = TypeVar("SettingsT", bound=Settings)

EPILOGUE = """
With --json, stdout is one JSON object: the summary, {"error", "exit_code"}, or both; logs go to stderr.
Exit codes: 0 done; 75 stopped cleanly before the end, the same command goes on; 2 settings, input or
environment that cannot work; 1 failed; 130 Ctrl-C before there was anything to resume."""
"""What every help ends with."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return `", did you mean 'x'?"` for the nearest known name, or the list of known names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def parse_job(
    job: type[JobT], section: str, args: Sequence[str] | None = None, *, prog: str | None = None
) -> JobT:
    """Read a job's settings from its YAML section and the command line; exit 2 on a bad one.

    Their `model_fields_set` are, at every depth, the options that the file or the command line names, so
    that a job can take the others from elsewhere.

    Args:
        job: the job's settings model; its docstring is the description shown by `--help`.
        section: name of the job's section in the settings file, unless the model names others.
        args: command line without the program name; `sys.argv[1:]` when omitted. What follows a lone `--`
            becomes the field `arguments` as it is, and a settings file belongs there too.
        prog: what the program is called in its help; `SECTION.py` when omitted.
    """
    given, passed_on = _split(sys.argv[1:] if args is None else args)
    try:
        if passed_on and "arguments" not in job.model_fields:
            raise ConfigError(f"{section} passes nothing on; leave `-- {' '.join(passed_on)}` away")
        _check_flags(job, given)
        path = _config_path(given)
        if path and "arguments" in job.model_fields:
            raise ConfigError(
                f"{section} reads no settings file; put --config after `--`, where it is the job's"
            )
        told = [flag for name in job.sections or (section,) for flag in _flags_from(path, job, name)]
        told += given
    except AcsrError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    description = f"{inspect.getdoc(job)}\n{EPILOGUE}"
    settings = tyro.cli(job, args=told, prog=prog or f"{section}.py", description=description)
    settings = _as_told(settings, {token.split("=", 1)[0].replace("_", "-") for token in told})
    return settings.model_copy(update={"arguments": passed_on}) if passed_on else settings


def _split(args: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return what stands before a lone `--`, and what it passes on to another job."""
    given = list(args)
    if "--" not in given:
        return given, ()
    end = given.index("--")
    return given[:end], tuple(given[end + 1 :])


def last_value(flags: Sequence[str], name: str) -> str | None:
    """Return what a flag such as `--output` is given last, None where it is not there."""
    value = None
    for token, following in zip(flags, [*flags, None][1:], strict=True):
        if token == name and following is not None:
            value = following
        elif token.startswith(f"{name}="):
            value = token.split("=", 1)[1]
    return value


def _flags_from(path: Path | None, job: type[JobSettings], section: str) -> list[str]:
    if path is None:
        return []
    try:
        values = load_section(path, section)
        if job.borrows:
            values = {key: value for key, value in values.items() if key in job.model_fields}
        return _flags_of(job, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_section(path: Path, section: str) -> dict[str, Any]:
    """Return one job's section of a YAML settings file; {} when the file has none for this job."""
    if not path.is_file():
        raise ConfigError(f"settings file {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict | None) for v in content.values()):
        raise ConfigError(f"{path} must hold one mapping per job, such as `{section}:`")
    for name in content:
        if name not in JOBS:
            raise ConfigError(f"unknown section {name!r}{did_you_mean(str(name), JOBS)}")
    return dict(content.get(section) or {})


def _config_path(args: Sequence[str]) -> Path | None:
    path = last_value(args, "--config")
    return None if path is None else Path(path)


def _field_settings(annotation: Any) -> type[Settings] | None:  # noqa: ANN401
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Settings):
            return candidate
    return None


def _flag(model: type[Settings], name: str, prefix: str) -> str:
    """Return a field's flag; a field may have a flag of another name, where pydantic forbids that name."""
    given = (getattr(part, "name", None) for part in model.model_fields[name].metadata)
    return f"--{prefix}{next(filter(None, given), name)}".replace("_", "-")


def _as_told(settings: SettingsT, flags: Set[str], prefix: str = "") -> SettingsT:
    """Return settings as they are, but that only what flags name counts as set."""
    values, named, model = dict[str, Any](), set[str](), type(settings)
    for name in model.model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            value = _as_told(value, flags, f"{prefix}{name}.")
            is_named = bool(value.model_fields_set)
        else:
            switched_off = f"--{prefix}no-{name}".replace("_", "-")
            is_named = _flag(model, name, prefix) in flags or switched_off in flags
        values[name] = value
        if is_named:
            named.add(name)
    # To pydantic's plugin for mypy it is of the base class.
    return cast("SettingsT", model.model_construct(_fields_set=named, **values))


def _flag_names(model: type[Settings], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        nested = _field_settings(field.annotation)
        if nested:
            yield from _flag_names(nested, f"{prefix}{name}.")
            continue
        yield _flag(model, name, prefix)
        if field.annotation is bool:
            yield f"--{prefix}no-{name}".replace("_", "-")


def _check_flags(job: type[JobSettings], args: Sequence[str]) -> None:
    known = [*_flag_names(job), "--help", "--json"]
    for token in args:
        flag = token.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            raise ConfigError(f"unknown option {flag}{did_you_mean(flag, known)}")


def _flags_of(model: type[Settings], values: Mapping[str, Any], prefix: str = "") -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        if key not in model.model_fields:
            known = list(model.model_fields)
            raise ConfigError(f"unknown key '{prefix}{key}'{did_you_mean(str(key), known)}")
        nested = _field_settings(model.model_fields[key].annotation)
        name = _flag(model, key, prefix)
        if nested and isinstance(value, dict):
            flags += _flags_of(nested, value, f"{prefix}{key}.")
        elif value is None and type(None) not in get_args(model.model_fields[key].annotation):
            raise ConfigError(f"key '{prefix}{key}' has no value")
        elif isinstance(value, bool):
            flags.append(name if value else f"--{prefix}no-{key}".replace("_", "-"))
        elif isinstance(value, list):
            flags += [name, *map(str, value)]
        else:
            flags += [name, str(value)]
    return flags


class Described(Settings):
    """Marker for settings that are written into manifests."""

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """Rebuild the settings from a manifest."""
        return cls.model_validate(description)
