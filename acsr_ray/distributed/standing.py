"""The settings that an output is bound to, as defaults for who works on it again: commands stay short."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from acsr_ray.artifacts import ArtifactError
from acsr_ray.corpus.binding import BUNDLE, read_json
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.records import LOOKED_AT, run_records
from acsr_ray.corpus.sources import CorpusError, absolute_uri
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.filesystems import connected
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


def completed(settings: SettingsT) -> SettingsT:
    """Return settings with the output's own where nothing was given, at every depth.

    Args:
        settings: whose `model_fields_set` is what was given.

    Raises:
        CorpusError: the output's settings are none of this release.
    """
    with connected(settings.connection):
        standing = standing_settings(settings.output)
    given = settings.model_dump(exclude_unset=True)
    try:
        return type(settings).model_validate(_over(standing, given))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise CorpusError(f"the settings of output {settings.output} cannot be used: {wrong}") from error


def _over(standing: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with what was given in their place."""
    merged = {**standing, **given}
    for name in standing.keys() & given.keys():
        if isinstance(standing[name], Mapping) and isinstance(given[name], Mapping):
            merged[name] = _over(standing[name], given[name])
    return merged


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
