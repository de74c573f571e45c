"""What runs left behind about themselves: a record per run, read whichever release wrote it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from acsr_ray.storage import Storage

RUNS, PROGRESS, PLAN = "_acsr/runs", "_acsr/progress.json", "_acsr/plan.json"
"""Where in an output they are, with how the present run stands, and what was planned for one."""

LOOKED_AT = 10
"""Records of which failed units are taken: a retry tells only of its own."""

SPOKEN = {
    "refused_shards": "refused shards",
    "failed_units": "failed units",
    "removed_shards": "removed shards",
}
"""Keys of a record, and what they were called in the reports of before."""


def run_records(storage: Storage, most: int) -> Iterator[dict[str, Any]]:
    """Yield the records of the last runs, the newest first; a file that is no record is passed over.

    Args:
        storage: of the output.
        most: how many.
    """
    records = {_run_of(name): name for name in storage.names(RUNS) if _is_record(name)}
    for run in sorted(records, reverse=True)[:most]:
        content = read_object(storage, f"{RUNS}/{records[run]}")
        if content is not None:
            yield _named(content, run)


def failed_units(storage: Storage) -> dict[str, str]:
    """Return why units failed in the last runs, by output name; some may have been done since."""
    found: dict[str, str] = {}
    for record in run_records(storage, LOOKED_AT):
        failed = record.get("failed_units")
        found = {**failed, **found} if isinstance(failed, Mapping) else found
    return found


def read_object(storage: Storage, name: str) -> dict[str, Any] | None:
    """Return a JSON object, None where there is none or it is something else."""
    try:
        content = json.loads(storage.read(name))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_record(name: str) -> bool:
    """Return whether a file is a run's record: `<run>/record.json`, or `<run>.json` of before."""
    return name.endswith("/record.json" if "/" in name else ".json")


def _run_of(name: str) -> str:
    return name.removesuffix("/record.json").removesuffix(".json")


def _named(content: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Return a record under the keys of now; what an older one does not say is absent."""
    record = dict(content)
    for key, before in SPOKEN.items():
        if key not in record and before in record:
            record[key] = record[before]
    record.setdefault("run", run)
    # Reports were written at the end alone.
    record.setdefault("outcome", "failed" if record.get("failed_units") else "done")
    return record
