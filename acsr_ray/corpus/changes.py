"""What of a corpus has to be done: shards that are new or changed since the last snapshot, shard by shard.

(URI, size, etag or time) is the fast key. Where it misses, the content decides, so that a shard that was only
touched is not done again. Nothing of an unchanged shard is read, not even its footer.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from acsr_ray.config import FailedError
from acsr_ray.corpus.containers import ContainerError
from acsr_ray.corpus.snapshot import Receipt, ShardEntry, Snapshot
from acsr_ray.corpus.sources import CorpusError, ImageFolder, Shard, absolute_uri, find_source
from acsr_ray.corpus.units import Unit, UnitPlan, folder_units, shard_units
from acsr_ray.storage import open_filesystem, patiently

HASHING_THREADS = 8


@dataclass
class ShardWork:
    """A shard of the input: its units, and what is to be done of them."""

    relative: str
    uri: str
    version: str
    content: str
    fingerprint: str
    units: list[Unit]
    receipts: dict[str, Receipt] = field(default_factory=dict)
    """Of the units that are published, by name."""

    @property
    def names(self) -> list[str]:
        """Output names of the units, in input order."""
        return [unit.output_name(self.fingerprint) for unit in self.units]

    @property
    def is_complete(self) -> bool:
        """Whether every unit is published."""
        return len(self.receipts) == len(self.units)

    def entry(self) -> ShardEntry:
        """Return what a snapshot keeps of it."""
        for unit, name in zip(self.units, self.names, strict=True):
            receipt = self.receipts.get(name)
            if receipt is not None and receipt.rows != unit.num_rows:
                raise FailedError(f"{name} holds {receipt.rows} rows of {unit.num_rows}")
        receipts = tuple(self.receipts[name] for name in self.names if name in self.receipts)
        mark = shortened(self.fingerprint)
        return ShardEntry(self.uri, self.version, self.content, receipts, mark, self.is_complete)


@dataclass(frozen=True)
class Refused:
    """A shard that cannot be read; the message says why."""

    uri: str
    relative: str
    reason: str


def shortened(fingerprint: str) -> str:
    """Return a fingerprint as snapshots keep it, once per shard."""
    return fingerprint[:16]


def check_there(location: str) -> None:
    """Raise `CorpusError` where there is nothing at all, in one request."""
    fs, root = open_filesystem(absolute_uri(location))
    if not patiently(lambda: fs.exists(root), f"looking for {location}"):
        raise CorpusError(f"input {absolute_uri(location)} does not exist")


def list_corpus(location: str) -> list[Shard] | ImageFolder:
    """List a corpus as `find_source` does, again where the storage does not answer."""
    return patiently(lambda: find_source(location), f"listing {location}")


def unchanged(shard: Shard, snapshot: Snapshot, fingerprint: str) -> ShardEntry | None:
    """Return a shard's entry in the snapshot if the shard is as it was then and all of it was done."""
    entry = snapshot.shards.get(shard.relative)
    same = (
        entry is not None
        and entry.complete
        and entry.fingerprint == shortened(fingerprint)
        and (entry.uri, entry.version) == (shard.uri, shard.version)
        and bool(shard.version)
    )
    return entry if same else None


def inspect_shards(
    shards: Sequence[Shard], plan: UnitPlan, snapshot: Snapshot, fingerprint: str
) -> Iterator[ShardWork | Refused]:
    """Read footers, and contents where neither the snapshot nor the store knows them, in order.

    Args:
        shards: what to inspect.
        plan: how to cut.
        snapshot: the current one.
        fingerprint: of the run.
    """

    def inspect(shard: Shard) -> ShardWork | Refused:
        return inspect_shard(shard, plan, snapshot, fingerprint)

    pool = ThreadPoolExecutor(HASHING_THREADS)
    try:
        waiting = iter(shards)
        # No further ahead than the threads: a corpus may have very many shards.
        running = [pool.submit(inspect, shard) for shard in islice(waiting, 2 * HASHING_THREADS)]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(inspect, shard) for shard in islice(waiting, 1)]
    finally:
        # Whoever stops does not wait for shards that nobody asks for any more.
        pool.shutdown(wait=False, cancel_futures=True)


def inspect_shard(shard: Shard, plan: UnitPlan, snapshot: Snapshot, fingerprint: str) -> ShardWork | Refused:
    """Return the units of one shard, or why it has none."""
    known = snapshot.shards.get(shard.relative)
    same = known is not None and (known.uri, known.version) == (shard.uri, shard.version)
    content = known.content if known is not None and same and shard.version else ""
    try:
        units = patiently(lambda: list(shard_units(shard, plan, content)), f"reading {shard.uri}")
    except ContainerError as error:
        return Refused(shard.uri, shard.relative, f"{error.code}: {error}")
    except FileNotFoundError:
        return Refused(shard.uri, shard.relative, "vanished: it was listed, and is no longer there")
    except OSError as error:
        # What another try cannot mend, such as no permission or a link to itself.
        return Refused(shard.uri, shard.relative, f"unreadable: {error}")
    content = units[0].content if units else ""
    return ShardWork(shard.relative, shard.uri, shard.version, content, fingerprint, units)


def folder_work(folder: ImageFolder, plan: UnitPlan, fingerprint: str) -> ShardWork:
    """Return a folder of images as one shard."""
    return ShardWork(folder.name, folder.name, "", "", fingerprint, list(folder_units(folder, plan)))
