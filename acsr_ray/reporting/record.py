"""What a run left behind about itself, read as far as it can be read.

`_acsr/runs/RUN/record.json` is the record; outputs of earlier releases have a shorter summary,
`_acsr/runs/RUN.json`, or nothing but their snapshot. Fields may be absent, and a field of another type than
it should have is left out and named, not fatal: a report is wanted most where something went wrong.
"""

import json
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from acsr_ray.columns import QUARANTINED
from acsr_ray.config import AcsrError, did_you_mean
from acsr_ray.corpus.records import RUNS
from acsr_ray.corpus.snapshot import Snapshot, total
from acsr_ray.storage import Storage

MOST_EARLIER = 50
"""Runs that are looked at for what one goes on from."""
RECORD = "record.json"
NAMED = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
THIS_RUN = re.compile(r"(\d+) images in (\d+) units")
SECRET = re.compile(
    r"secret|password|passwd|token|credential|(access|api|private|account)_?key", re.IGNORECASE
)
USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
HIDDEN = "(hidden)"
SUMMARY_ONLY = {
    "images",
    "statuses",
    "quarantined",
    "this run",
    "images/s",
    "elapsed_s",
    "refused shards",
    "failed units",
    "removed shards",
}
"""Keys of an earlier release's summary that are no settings."""


class RunNotFoundError(AcsrError, ValueError):
    """A run, or an output, of which nothing is there."""


class Tolerant(BaseModel):
    """Base of what is read here: frozen, keys that are not known are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Bins(Tolerant):
    """A histogram; empty where nothing was counted."""

    edges: tuple[float, ...] = ()
    """One more than counts, ascending."""
    counts: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Bins":
        if (self.edges or self.counts) and len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts need one more edge, got {len(self.edges)}")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("edges must ascend")
        return self

    @property
    def total(self) -> int:
        """Everything that was counted."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return about where a share of what was counted lies below; nan where nothing was counted."""
        left = share * self.total
        for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            if count and left <= count:
                return low + (high - low) * left / count
            left -= count
        return math.nan


class Resources(Tolerant):
    """What the cluster had; nothing where a record does not tell."""

    cpus: float = 0.0
    gpus: float = 0.0


class EarlierRuns(Tolerant):
    """Sums over runs that were cut short and that a run goes on from, all of one plan."""

    runs: int = 0
    images: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    quarantined: int = 0
    memory_mib: dict[str, float] = Field(default_factory=dict)
    """Largest of each kind."""


class CorpusTotals(Tolerant):
    """What the whole output holds after the run."""

    images: int = 0
    statuses: dict[str, int] = Field(default_factory=dict)
    quarantined: dict[str, int] = Field(default_factory=dict)
    """Images per reason."""


def without_secrets(value: Any) -> Any:  # noqa: ANN401
    """Return JSON values with what looks like a credential hidden: a report is mailed around."""
    if isinstance(value, dict):
        hidden = {key: HIDDEN for key, inner in value.items() if SECRET.search(key) and inner is not None}
        return {key: hidden.get(key) or without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return USER_INFO.sub("", value) if isinstance(value, str) else value


Shareable = BeforeValidator(without_secrets)


def _ascending(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if any(one[0] > two[0] for one, two in pairwise(points)):
        raise ValueError("times must ascend")
    return points


class RunRecord(Tolerant):
    """A run as it told of itself; defaults stand for what it did not tell."""

    run: str = ""
    started_at: str = ""
    """ISO 8601, UTC."""
    elapsed_s: float | None = None
    outcome: str = "unknown"
    """`running`, `done`, `stopped`, `failed`."""
    detail: Annotated[str, Shareable] = ""
    """Why it stopped or failed."""
    input: Annotated[str, Shareable] = ""
    output: Annotated[str, Shareable] = ""
    bundle: str = ""
    settings: Annotated[dict[str, Any], Shareable] = Field(default_factory=dict)
    images: int | None = None
    """Of this run, as the following."""
    units: int | None = None
    statuses: dict[str, int] = Field(default_factory=dict)
    reasons: dict[str, int] = Field(default_factory=dict)
    clusters: dict[str, int] = Field(default_factory=dict)
    """Images by `<class>/<cluster>`."""
    residual: Bins = Bins()
    distance: Bins = Bins()
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    resources: Resources = Resources()
    memory_mib: dict[str, float] = Field(default_factory=dict)
    """Most memory of the `driver`, and of a `worker`."""
    timeline: Annotated[tuple[tuple[float, float], ...], AfterValidator(_ascending)] = ()
    """(seconds since the start, images so far)."""
    retries: int | None = None
    batch_fill: float | None = None
    refused_shards: dict[str, str] = Field(default_factory=dict)
    failed_units: dict[str, str] = Field(default_factory=dict)
    refused_shards_total: int = 0
    failed_units_total: int = 0
    """How many there were, where the lists name only the first."""
    new_shards: tuple[str, ...] = ()
    changed_shards: tuple[str, ...] = ()
    removed_shards: tuple[str, ...] = ()
    new_shards_total: int = 0
    changed_shards_total: int = 0
    removed_shards_total: int = 0
    unit_names: tuple[str, ...] = ()
    """Some units of this run, where the record names them."""
    corpus: CorpusTotals | None = None
    plan: Annotated[dict[str, Any] | None, Shareable] = None
    earlier: EarlierRuns = EarlierRuns()
    """What runs of the same plan did before this one."""
    unreadable: dict[str, str] = Field(default_factory=dict)
    """Fields of the file that could not be read, and why."""
    origin: str = ""
    """File it was read from."""

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_before(cls, fields: Any) -> Any:  # noqa: ANN401  (whatever is validated)
        """Take the number of removed shards that earlier releases wrote in the place of their names."""
        if isinstance(fields, dict) and isinstance(fields.get("removed_shards"), int):
            return {**fields, "removed_shards": (), "removed_shards_total": fields["removed_shards"]}
        return fields

    @property
    def num_removed(self) -> int:
        """Shards that left the output, named or not."""
        return max(self.removed_shards_total, len(self.removed_shards))

    @property
    def num_refused(self) -> int:
        """Refused shards, named or not."""
        return max(self.refused_shards_total, len(self.refused_shards))

    @property
    def num_failed(self) -> int:
        """Failed units, named or not."""
        return max(self.failed_units_total, len(self.failed_units))


def list_runs(storage: Storage) -> dict[str, str]:
    """Return the file of every run that left one, by run, oldest first; a record before a summary."""
    found: dict[str, str] = {}
    for name in sorted(storage.names(RUNS)):
        run, _, file = name.partition("/")
        if file == RECORD:
            found[run] = name
        elif not file and run.endswith(".json"):
            found.setdefault(run.removesuffix(".json"), name)
    return {run: f"{RUNS}/{found[run]}" for run in sorted(found) if NAMED.fullmatch(run)}


def load_record(storage: Storage, snapshot: Snapshot, run: str | None = None) -> RunRecord:
    """Return the record of a run.

    Args:
        storage: of the output.
        snapshot: the current one; gives the totals where the record has none.
        run: which; None takes the last one, or what the snapshot alone says.

    Raises:
        RunNotFoundError: no such run, or no purification at all.
    """
    runs = list_runs(storage)
    if run is not None and run not in runs:
        known = did_you_mean(run, list(runs)) if runs else "; it has none"
        raise RunNotFoundError(f"{storage.root} has no run {run!r}{known}")
    if not runs and not snapshot.number:
        raise RunNotFoundError(f"there is no purification at {storage.root}")
    name = run or next(reversed(runs), "")
    if not name:
        alone = {"run": f"snapshot-{snapshot.number:08d}", "refused_shards": snapshot.refused}
        return read_record(alone, storage, snapshot)
    fields = {**_content(storage, runs[name]), "run": name}
    if not runs[name].endswith(f"/{RECORD}"):
        fields = _from_summary(fields)
    before = [runs[one] for one in reversed(runs) if one < name]
    record = read_record({**fields, "origin": runs[name]}, storage, snapshot)
    return record.model_copy(update={"earlier": _earlier(storage, record.plan, before)})


def _earlier(storage: Storage, plan: Mapping[str, Any] | None, files: list[str]) -> EarlierRuns:
    """Sum up the runs just before a run that had its plan and came to no end, the last one first."""
    found = EarlierRuns()
    for file in files[:MOST_EARLIER] if plan and plan.get("planned_at") else ():
        record = read_fields(_content(storage, file))
        same = record.plan is not None and record.plan.get("planned_at") == (plan or {})["planned_at"]
        if not same or record.outcome == "done":
            break
        found = with_run(found, record)
    return found


def with_run(before: EarlierRuns, record: RunRecord) -> EarlierRuns:
    """Return the sums with one run more."""
    elapsed = record.elapsed_s or 0.0
    kinds = before.memory_mib.keys() | record.memory_mib.keys()
    return EarlierRuns(
        runs=before.runs + 1,
        images=before.images + (record.images or 0),
        elapsed_s=before.elapsed_s + elapsed,
        cpu_s=before.cpu_s + elapsed * record.resources.cpus,
        gpu_s=before.gpu_s + elapsed * record.resources.gpus,
        quarantined=before.quarantined + record.statuses.get(QUARANTINED, 0),
        memory_mib={
            kind: max(before.memory_mib.get(kind, 0.0), record.memory_mib.get(kind, 0.0)) for kind in kinds
        },
    )


def read_record(fields: Mapping[str, Any], storage: Storage, snapshot: Snapshot) -> RunRecord:
    """Return a record of what can be used of its fields; totals from the output where it has none.

    Args:
        fields: as `record.json` has them.
        storage: of the output.
        snapshot: the current one.
    """
    sums = total(snapshot.receipts())
    output = {"images": sums["rows"], "statuses": sums["statuses"], "quarantined": sums["quarantined"]}
    there = {name: value for name, value in fields.items() if value is not None}
    return read_fields({"corpus": output, "output": storage.root, **there})


def read_fields(fields: Mapping[str, Any]) -> RunRecord:
    """Return a record of what can be used of its fields."""
    known = {name: fields[name] for name in RunRecord.model_fields if fields.get(name) is not None}
    unreadable: dict[str, str] = {}
    while True:
        try:
            return RunRecord.model_validate({**known, "unreadable": unreadable})
        except ValidationError as error:
            wrong = {str(entry["loc"][0]): entry["msg"] for entry in error.errors()}
            unreadable |= wrong
            known = {name: value for name, value in known.items() if name not in wrong}


def _content(storage: Storage, name: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read(name))
    except (ValueError, RecursionError) as error:
        return {"unreadable": {}, "detail": f"{name} is damaged: {error}"}
    return content if isinstance(content, dict) else {"detail": f"{name} is no record"}


def _from_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that an earlier release's summary has under other names."""
    counts = THIS_RUN.fullmatch(str(summary.get("this run", "")))
    failed = summary.get("failed units") or {}
    return {
        "run": summary["run"],
        "started_at": "",
        "elapsed_s": summary.get("elapsed_s"),
        "outcome": "failed" if failed else "done" if "images" in summary else "unknown",
        "detail": summary.get("detail", ""),
        "input": summary.get("input"),
        "settings": {key: value for key, value in summary.items() if key not in SUMMARY_ONLY | {"run"}},
        "images": int(counts[1]) if counts else 0,
        "units": int(counts[2]) if counts else 0,
        "refused_shards": summary.get("refused shards"),
        "failed_units": failed,
        "removed_shards": summary.get("removed shards"),
        "corpus": {
            "images": summary.get("images", 0),
            "statuses": summary.get("statuses", {}),
            "quarantined": summary.get("quarantined", {}),
        },
    }
