"""A survey of a corpus before anything is done: what is there, what is to do of it, and what cannot be read.

Only listings and footers are read, never a body. What a run learns by hashing a shard is therefore not known
here, and the survey says of what: a shard whose size or time changed may hold the same bytes, and units that
a killed run published after its last snapshot may be those that a new one would make.
"""

from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from acsr_ray.corpus.changes import shortened, unchanged
from acsr_ray.corpus.containers import ContainerError
from acsr_ray.corpus.ledger import shard_of
from acsr_ray.corpus.retrying import Generations
from acsr_ray.corpus.snapshot import ShardEntry, Snapshot
from acsr_ray.corpus.sources import ImageFolder, Shard
from acsr_ray.corpus.units import (
    Unit,
    UnitPlan,
    folder_units,
    limited,
    parquet_facts,
    parquet_units,
    tar_facts,
    tar_units,
)
from acsr_ray.storage import patiently

FOOTER_THREADS = 16
UNKNOWN = "unknown"
"""Content of a shard that only hashing would tell; units with it are for counting and for reading."""

State = Literal["new", "changed", "unfinished", "unchanged", "refused"]
STATES: tuple[State, ...] = ("new", "changed", "unfinished", "unchanged", "refused")


@dataclass(frozen=True)
class Problem:
    """A shard that a run would leave out."""

    shard: str
    """URI."""
    code: str
    """A `ContainerCode`, or `vanished`, or `unreadable` for what the store does not deliver."""
    message: str

    def as_json(self) -> dict[str, str]:
        """Return it as plain values."""
        return {"shard": self.shard, "code": self.code, "message": self.message}


@dataclass(frozen=True)
class ShardSurvey:
    """What is known of one shard, or of a folder of images, which is one shard to an output."""

    uri: str
    state: State
    images: int = 0
    units: int = 0
    image_bytes: int = 0
    """Encoded, of a tar with the texts beside them; 0 for an unchanged shard, whose footer is not read."""
    row_groups: int = 0
    to_do: tuple[Unit, ...] = ()
    """Units that a run would purify. Where `content` is `UNKNOWN`, their output names are not known."""
    is_hashed: bool = False
    """Whether a run would read all of it once, only to tell its content."""
    maybe_done: int = 0
    """Images of `to_do` that a run may find done once it has hashed the shard."""
    problem: Problem | None = None

    @property
    def images_to_do(self) -> int:
        """Images of the units to do."""
        return sum(unit.num_rows for unit in self.to_do)


@dataclass(frozen=True)
class Survey:
    """What is known of a corpus, in input order."""

    shards: tuple[ShardSurvey, ...]
    removed: tuple[str, ...] = field(default=())
    """Shards of the output, by relative path, that left the input: a run removes what was made of them."""

    @property
    def units_to_do(self) -> list[Unit]:
        """Every unit that a run would purify."""
        return [unit for shard in self.shards for unit in shard.to_do]

    @property
    def problems(self) -> list[Problem]:
        """Shards that a run would leave out."""
        return [shard.problem for shard in self.shards if shard.problem is not None]

    def as_json(self) -> dict[str, Any]:
        """Return the sums: images, bytes, shards by state, units, and how much of it is uncertain."""
        told = self.shards
        hashed = [shard for shard in told if shard.is_hashed]
        return {
            "images": sum(shard.images for shard in told),
            "images_to_do": sum(shard.images_to_do for shard in told),
            "images_maybe_done": sum(shard.maybe_done for shard in told),
            "bytes": sum(shard.image_bytes for shard in told),
            "bytes_hashed": sum(shard.image_bytes for shard in hashed),
            "shards": len(told),
            "shard_states": {state: sum(s.state == state for s in told) for state in STATES},
            "removed_shards": len(self.removed),
            "row_groups": sum(shard.row_groups for shard in told),
            "units": sum(shard.units for shard in told),
            "units_to_do": sum(len(shard.to_do) for shard in told),
            "problems": [problem.as_json() for problem in self.problems],
        }


@dataclass(frozen=True)
class OutputState:
    """What an output has already, as far as a survey asks; the default is one that is not there."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    fingerprint: str = ""
    """Of the run."""
    finished: Set[str] = frozenset()
    """Names of the finished units (`Ledger.finished`)."""


def survey_corpus(
    source: Sequence[Shard] | ImageFolder, plan: UnitPlan, output: OutputState, limit: int | None = None
) -> Survey:
    """Survey a corpus as it was listed, by footers alone.

    Args:
        source: from `list_corpus`.
        plan: how a run would cut it.
        output: what the output has.
        limit: only the first so many rows; a run with one looks into unchanged shards too.

    Raises:
        StorageError: the store did not answer for too long.
    """
    if isinstance(source, ImageFolder):
        size = sum(file.num_bytes for file in source.files)
        found: Iterator[_Found] = iter([_Found(source.name, list(folder_units(source, plan)), size)])
        return Survey(tuple(_judged(found, output, limit)))
    shards = tuple(_judged(_looked_at(source, plan, output, limit), output, limit))
    gone = output.snapshot.shards.keys() - {shard.relative for shard in source}
    return Survey(shards, tuple(sorted(gone)))


@dataclass(frozen=True)
class _Found:
    """What a look at one shard found."""

    uri: str
    units: list[Unit] = field(default_factory=list)
    image_bytes: int = 0
    row_groups: int = 0
    problem: Problem | None = None
    entry: ShardEntry | None = None
    """Of the snapshot, where the shard is as it was then and nothing of it was read."""

    @property
    def is_hashed(self) -> bool:
        return any(unit.content == UNKNOWN for unit in self.units)


def _looked_at(
    source: Sequence[Shard], plan: UnitPlan, output: OutputState, limit: int | None
) -> Iterator[_Found]:
    """Look at each shard in order; footers are read ahead, but no further than the threads."""

    def look(shard: Shard) -> _Found:
        entry = unchanged(shard, output.snapshot, output.fingerprint) if limit is None else None
        if entry is not None and all(receipt.name in output.finished for receipt in entry.receipts):
            return _Found(shard.uri, entry=entry)
        return _read(shard, plan, output.snapshot)

    pool = ThreadPoolExecutor(FOOTER_THREADS)
    try:
        waiting = iter(source)
        running = [pool.submit(look, shard) for shard in islice(waiting, 2 * FOOTER_THREADS)]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(look, shard) for shard in islice(waiting, 1)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read(shard: Shard, plan: UnitPlan, snapshot: Snapshot) -> _Found:
    known = snapshot.shards.get(shard.relative)
    same = known is not None and (known.uri, known.version) == (shard.uri, shard.version)
    content = known.content if known is not None and same and shard.version else ""
    try:
        return patiently(
            lambda: _inside(shard, plan, content or shard.digest or UNKNOWN), f"reading {shard.uri}"
        )
    except ContainerError as error:
        problem = Problem(shard.uri, error.code, str(error))
    except FileNotFoundError:
        problem = Problem(shard.uri, "vanished", "it was listed, and is no longer there")
    except OSError as error:
        problem = Problem(shard.uri, "unreadable", str(error))
    return _Found(shard.uri, problem=problem)


def _inside(shard: Shard, plan: UnitPlan, content: str) -> _Found:
    """Return what a shard's own index tells: the footer of Parquet, the headers of a tar."""
    if shard.is_tar:
        index = tar_facts(shard, plan)
        return _Found(shard.uri, list(tar_units(shard, index, content)), index.num_bytes)
    facts = parquet_facts(shard, plan)
    units = list(parquet_units(shard, plan, facts, content)) if facts.num_rows else []
    return _Found(shard.uri, units, facts.image_bytes, facts.row_groups)


def _judged(found: Iterator[_Found], output: OutputState, limit: int | None) -> Iterator[ShardSurvey]:
    """Say of each shard what is to do, up to the limit."""
    generations = Generations(output.snapshot, output.fingerprint, output.finished, None)
    left = limit
    for shard in found:
        if left == 0:
            return
        rows = sum(unit.num_rows for unit in shard.units)
        units = list(limited(shard.units, left))
        kept = sum(unit.num_rows for unit in units)
        left = None if left is None else left - kept
        size = shard.image_bytes * kept // rows if rows else shard.image_bytes
        # Units that a retry made have other names.
        units = list(map(generations.current, units))
        yield _judge(replace(shard, units=units, image_bytes=size), output)


def _judge(shard: _Found, output: OutputState) -> ShardSurvey:
    if shard.problem is not None:
        return ShardSurvey(shard.uri, "refused", problem=shard.problem)
    if shard.entry is not None:
        rows = sum(receipt.rows for receipt in shard.entry.receipts)
        return ShardSurvey(shard.uri, "unchanged", rows, len(shard.entry.receipts))
    names = [unit.output_name(output.fingerprint) for unit in shard.units]
    waiting = list(zip(shard.units, names, strict=True))
    maybe = 0
    if shard.is_hashed:
        maybe = _maybe_done(waiting, output)
    else:
        waiting = [(unit, name) for unit, name in waiting if name not in output.finished]
    return ShardSurvey(
        shard.uri,
        _state(shard, bool(waiting), output),
        sum(unit.num_rows for unit in shard.units),
        len(shard.units),
        shard.image_bytes,
        shard.row_groups,
        tuple(unit for unit, _ in waiting),
        shard.is_hashed,
        maybe,
    )


def _state(shard: _Found, is_waiting: bool, output: OutputState) -> State:
    if not shard.units:
        return "unchanged"
    known = output.snapshot.shards.get(shard.units[0].relative)
    if not is_waiting:
        return "unchanged"
    if known is None:
        return "new"
    same = (known.uri, known.version) == (shard.uri, shard.units[0].version)
    # A folder of images has no version; that some of its units are to do says that it changed.
    return (
        "unfinished"
        if same and known.version and known.fingerprint == shortened(output.fingerprint)
        else "changed"
    )


def _maybe_done(waiting: Sequence[tuple[Unit, str]], output: OutputState) -> int:
    """Return the images of units whose names, but for the part that the content decides, are there."""
    unit = waiting[0][0]
    known = output.snapshot.shards.get(unit.relative)
    if known is not None and _size(known.version) != _size(unit.version):
        return 0  # another size is another content
    stems = {_stem(name) for name in output.finished if shard_of(name) == unit.relative}
    return sum(unit.num_rows for unit, name in waiting if _stem(name) in stems)


def _size(version: str) -> str:
    return version.partition("-")[0]


def _stem(name: str) -> str:
    return name.rsplit(".", 2)[0]
