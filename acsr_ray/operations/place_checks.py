"""What is looked at elsewhere: where the output goes, where the input comes from, and the cluster between."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from acsr_ray.config import AcsrError
from acsr_ray.corpus.changes import Refused, inspect_shard, list_corpus
from acsr_ray.corpus.lease import look
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.snapshot import Snapshot
from acsr_ray.corpus.sources import ImageFolder, absolute_uri
from acsr_ray.corpus.units import UnitPlan
from acsr_ray.distributed.probe import auth_mode, view_cluster
from acsr_ray.operations.finding import Finding
from acsr_ray.storage import DiskStorage, Storage

PROBES = "_acsr/probes"
TOKEN_HINT = "set RAY_AUTH_MODE=token here and on the cluster: without, whoever reaches it can run code on it"


def check_output(location: str, min_free_megabytes: int) -> Iterator[Finding]:
    """Write, refuse to replace, read and remove a probe; look at room and at who holds the output."""
    place = absolute_uri(location)
    made = _missing_folders(place)
    try:
        ledger = Ledger(place)
        wrong = _try_storage(ledger.storage)
    except (AcsrError, OSError) as error:
        yield Finding("output", "fail", str(error), "check the path, its rights, endpoint and credentials")
        return
    finally:
        for folder in made:
            _remove_empty(folder)
    if wrong:
        yield Finding("output", "fail", f"{place}: {wrong}", "runs could replace each other's files there")
        return
    yield Finding("output", "ok", f"{place}: written, not replaced, read, removed")
    free = ledger.storage.free_bytes()
    if free is not None:
        told = f"{free / 2**30:.1f} GiB"
        if free < min_free_megabytes * 2**20:
            yield Finding("free disk", "fail", told, f"below --min-free-megabytes {min_free_megabytes}")
        else:
            yield Finding("free disk", "ok", told)
    lease = look(ledger.storage)
    if lease is not None and lease.lives:
        yield Finding(
            "lease", "warn", "a run is under way", "a second one would be refused; see acsr-ray status"
        )


def check_input(location: str, image_column: str) -> Finding:
    """List the input and open its first shard."""
    hint = "check --input, --image-column, endpoint and credentials"
    try:
        source = list_corpus(absolute_uri(location))
        if isinstance(source, ImageFolder):
            return Finding("input", "ok", f"a folder of {len(source.files)} images")
        # A digest is given, so that none is computed.
        first = replace(source[0], digest="any")
        work = inspect_shard(first, UnitPlan(image_column), Snapshot(), "")
    except (AcsrError, OSError) as error:
        return Finding("input", "fail", str(error), hint)
    if isinstance(work, Refused):
        return Finding("input", "fail", f"{work.uri}: {work.reason}", hint)
    rows = sum(unit.num_rows for unit in work.units)
    return Finding("input", "ok", f"{len(source)} shards, the first with {rows} rows")


def check_cluster(address: str | None) -> Finding:
    """Join the cluster that is named, if one is, and tell how it authenticates."""
    mode = auth_mode()
    if address is None:
        return Finding("cluster", "ok", "none named: a job starts a local Ray (--ray.address, RAY_ADDRESS)")
    try:
        view = view_cluster(address)
    except AcsrError as error:
        return Finding("cluster", "fail", str(error), "see the message")
    cpus, gpus = view.resources["CPU"], view.resources["GPU"]
    told = f"{address}: {view.nodes} nodes, {cpus:g} CPUs, {gpus:g} GPUs, auth {mode or 'not set'}"
    if not cpus:
        return Finding("cluster", "fail", told, "no CPUs: workers are not up yet, or the head has none")
    if mode != "token":
        return Finding("cluster", "warn", told, TOKEN_HINT)
    return Finding("cluster", "ok", told)


def _try_storage(storage: Storage) -> str:
    """Return what a storage does wrong with a probe, "" where nothing."""
    name = f"{PROBES}/{uuid.uuid4().hex}"
    if not storage.create(name, b"one"):
        return "a new file was taken for one that is there"
    try:
        wrong = _wrong_with(storage, name)
    except (AcsrError, OSError):
        # What failed first is what there is to tell.
        with contextlib.suppress(AcsrError, OSError):
            storage.remove(name)
        raise
    storage.remove(name)
    return wrong


def _wrong_with(storage: Storage, name: str) -> str:
    """Return what is wrong with a file that was created as `one`."""
    if storage.create(name, b"two"):
        return "a file was replaced that was there"
    if storage.read(name) != b"one":
        return "a file does not hold what was written"
    listed = storage.names(PROBES).get(name.removeprefix(f"{PROBES}/"))
    return "" if listed == len(b"one") else "a new file is not listed"


def _missing_folders(place: str) -> list[Path]:
    """Return the folders that a probe would make on a disk, the innermost first."""
    protocol, separator, rest = place.partition("://")
    if separator and protocol not in ("file", "local"):
        return []
    root = Path(rest if separator else place)
    inner = [root / PROBES, root / DiskStorage.STAGING, root / "_acsr", root, *root.parents]
    return [folder for folder in inner if not folder.exists()]


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
