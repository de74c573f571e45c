"""The settings that an output is bound to, as defaults for who works on it again: commands stay short."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from acsr_ray.artifacts import ArtifactError
from acsr_ray.config import last_value
from acsr_ray.corpus.binding import BUNDLE, read_json
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.records import LOOKED_AT, run_records
from acsr_ray.corpus.sources import absolute_uri
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.filesystems import StorageSettings, connected, resolve_connection
from acsr_ray.purification.bundle import DEFAULT_BUNDLE, bundle_digest

LOCATIONS = ("bundle", "doubt", "target")
"""Settings that an output knows by digest only; where they were is told by the records of its runs."""

SettingsT = TypeVar("SettingsT", bound=PurifyCorpusSettings)


def standing_settings(output: str | None) -> dict[str, Any]:
    """Return settings of `purify_corpus` that an output was made with; {} where there is none.

    Args:
        output: folder or URI of a purification.
    """
    if output is None:
        return {}
    ledger = Ledger(absolute_uri(output))
    bound = ledger.binding.settings()
    if bound is None:
        return {}
    standing = {name: bound[name] for name in PurifyCorpusSettings.model_fields if name in bound}
    records = [_settings_of(record) for record in run_records(ledger.storage, LOOKED_AT)]
    made_by = read_json(ledger.storage, BUNDLE) or {}
    named = [record.get("bundle") for record in records] + [made_by.get("bundle", {}).get("name")]
    for location in dict.fromkeys([DEFAULT_BUNDLE, *filter(None, named)]):
        if _has_digest(str(location), bound.get("bundle_digest")):
            standing["bundle"] = str(location)
            break
    if "doubt_digest" in bound:
        told = next((record for record in records if record.get("doubt")), {})
        standing |= {name: told[name] for name in ("doubt", "target") if told.get(name)}
    return standing


def standing_for(flags: Sequence[str]) -> Mapping[str, Any]:
    """Return the settings of the output that flags name."""
    output = last_value(flags, "--output")
    with connected(resolve_connection(_storage(flags), StorageSettings(), output or "")):
        return standing_settings(output)


def completed(settings: SettingsT) -> SettingsT:
    """Return settings with the output's own where nothing was given; for callers that are programs."""
    with connected(settings.connection):
        standing = standing_settings(settings.output)
    missing = {name: value for name, value in standing.items() if name not in settings.model_fields_set}
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    return type(settings).model_validate({**missing, **given})


def _storage(flags: Sequence[str]) -> StorageSettings:
    """Return how flags say that the output is reached; they are checked as a whole afterwards."""
    names = {name: f"--storage.{name.replace('_', '-')}" for name in StorageSettings.model_fields}
    told: dict[str, Any] = {name: last_value(flags, flag) for name, flag in names.items()}
    told["anonymous"] = names["anonymous"] in flags
    try:
        return StorageSettings.model_validate({name: value for name, value in told.items() if value})
    except ValidationError:
        return StorageSettings()  # the parser says what is wrong with them


def _settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a record tells, wherever it tells them."""
    inside = record.get("settings")
    told = dict(inside) if isinstance(inside, Mapping) else {}
    return {name: told.get(name, record.get(name)) for name in LOCATIONS}


def _has_digest(location: str, digest: object) -> bool:
    try:
        return bundle_digest(location) == digest
    except (ArtifactError, OSError):
        return False
