"""An output as a Delta Lake table: a log beside the files, which stay what and where they are.

The table's root is the output's folder: `_delta_log/` lists the files of `data/` by relative paths, so no row
is written twice and whoever reads `data/` sees no difference. Every snapshot becomes one commit of the log,
which adds and removes files at once and carries an application transaction: the output's own identifier and
the snapshot's number. The log only ever follows the snapshot: a commit that a crash prevented is made up for
by the next run, one that was made is not made again, and what other writers do to the table is undone.

The only module that imports `deltalake` (the extra `delta`).
"""

import contextlib
import importlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from acsr_ray.columns import STATUS
from acsr_ray.config import FailedError, MissingExtraError, ResumableStop
from acsr_ray.corpus.containers import ContainerError, open_parquet
from acsr_ray.corpus.delta_types import DeltaSchemaError, delta_schema, merge_schemas
from acsr_ray.corpus.snapshot import Receipt, Snapshot
from acsr_ray.corpus.sources import Shard
from acsr_ray.filesystems import Access, current_connection
from acsr_ray.storage import Storage, StorageError, StorageLocationError, patiently

logger = logging.getLogger(__name__)

MARK = "_acsr/delta.json"
"""Makes an output a table, and holds its identifier."""
FOOTER_THREADS = 8
WAY_OUT = "to give the table up, remove _delta_log and _acsr/delta.json of the output"


class DeltaConflictError(ResumableStop):
    """Another run has committed a later snapshot to the table."""


def begin_delta(storage: Storage, first: Shard | None = None) -> None:
    """Make an output a Delta table from its next snapshot on; one that is a table already stays it.

    Args:
        storage: of the output.
        first: a shard of the input, whose columns are looked at before anything is purified.

    Raises:
        MissingExtraError: `deltalake` is not installed.
        DeltaSchemaError: the input has columns that a Delta table cannot have.
        StorageLocationError: an output that is neither on a disk nor in S3.
    """
    _load()
    if storage.root.startswith("memory://"):
        raise StorageLocationError(f"{storage.root} cannot be a Delta table: use a folder or s3://")
    if first is not None:
        # One that cannot be read is left out of the output, and says nothing of the others.
        with contextlib.suppress(ContainerError, FileNotFoundError):
            delta_schema(_footer_schema(first.uri))
    content = json.dumps({"app_id": uuid.uuid4().hex}, indent=1) + "\n"
    storage.create(MARK, content.encode())


def find_delta(storage: Storage) -> "DeltaLog | None":
    """Return the log of an output that is a table, None for one that is not.

    Raises:
        MissingExtraError: it is one, and `deltalake` is not installed.
    """
    try:
        content = json.loads(storage.read(MARK))
    except FileNotFoundError:
        return None
    return DeltaLog(storage.root, content["app_id"])


class DeltaLog:
    """The log of one output.

    Args:
        root: absolute path or URI of the output.
        app_id: identifier of the output in application transactions.

    Raises:
        MissingExtraError: `deltalake` is not installed.
    """

    def __init__(self, root: str, app_id: str) -> None:
        self.root, self.app_id = root, app_id
        self.left_out: dict[str, str] = {}
        """Why shards are not in the table, by relative path; of the last call of `follow`."""
        self._library = _load()
        self._options = storage_options(root, os.environ, current_connection().access(root))
        self._table: Any = None

    def follow(self, snapshot: Snapshot, present: Iterable[str], sizes: Mapping[str, int]) -> None:
        """Commit what makes the table hold the files of a snapshot; nothing where it holds just these.

        Args:
            snapshot: the current one of the output.
            present: names of those of its files that are in `data/`.
            sizes: in bytes, of at least these.

        Raises:
            DeltaConflictError: another run committed meanwhile.
            FailedError: the log is damaged, or cannot be written.
            StorageError: the store did not answer for too long.
        """
        try:
            self._follow(snapshot, set(present), sizes)
        except self._library.exceptions.CommitFailedError as error:
            raise DeltaConflictError(f"another writer of the Delta table at {self.root}: {error}") from error
        except self._library.exceptions.DeltaError as error:
            raise FailedError(f"the Delta table at {self.root} cannot follow: {error}; {WAY_OUT}") from error
        except OSError as error:
            raise StorageError(f"the Delta table at {self.root} could not be written: {error}") from error

    def _follow(self, snapshot: Snapshot, present: set[str], sizes: Mapping[str, int]) -> None:
        table = self._open()
        committed = None if table is None else table.transaction_version(self.app_id)
        if committed is not None and committed > snapshot.number:
            raise DeltaConflictError(
                f"the Delta table at {self.root} is at snapshot {committed}, this run at {snapshot.number}; "
                f"if no other run is under way: {WAY_OUT}"
            )
        listed = set() if table is None else _paths(table)
        wanted = {r.name: r for r in snapshot.receipts() if r.name in present}
        missing = [receipt for name, receipt in wanted.items() if f"data/{name}" not in listed]
        schema, fitting = self._fitting(missing)
        adds = [self._add(receipt, sizes[receipt.name]) for receipt in fitting]
        gone = sorted(listed - {f"data/{name}" for name in wanted})
        if not adds and not gone:
            return
        self._commit(snapshot.number, schema, adds, gone)
        logger.info("Delta table: %d files added, %d removed", len(adds), len(gone))

    def _open(self) -> Any:  # noqa: ANN401  (imported late)
        """Return the table at its newest version, None where there is none."""
        delta = self._library

        def attempt() -> Any:  # noqa: ANN401
            # Not `is_deltatable`: while it waits, all threads do, the lease's heartbeat among them.
            with contextlib.suppress(delta.exceptions.TableNotFoundError):
                if self._table is None:
                    self._table = delta.DeltaTable(self.root, storage_options=self._options)
                else:
                    self._table.update_incremental()
            return self._table

        return patiently(attempt, f"reading the Delta log of {self.root}")

    def _fitting(self, receipts: list[Receipt]) -> tuple[pa.Schema, list[Receipt]]:
        """Return the table's schema with what new files add to it, and those files that fit in."""
        by_shard: dict[str, list[Receipt]] = {}
        for receipt in receipts:
            by_shard.setdefault(receipt.name.rsplit(".rows-", 1)[0], []).append(receipt)
        # A table calls the elements of its lists otherwise than `delta_schema` does.
        merged = delta_schema(pa.schema([] if self._table is None else self._table.schema().to_arrow()))
        self.left_out, fitting = {}, []
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            # The units of a shard have the same columns.
            found = pool.map(self._columns, (group[0].name for group in by_shard.values()))
            for (relative, group), schema in zip(by_shard.items(), found, strict=True):
                try:
                    merged = merge_schemas(merged, delta_schema(schema))
                except DeltaSchemaError as error:
                    self.left_out[relative] = str(error)
                    logger.warning("shard %s is not in the Delta table: %s", relative, error)
                else:
                    fitting += group
        return merged, fitting

    def _columns(self, name: str) -> pa.Schema:
        return _footer_schema(f"{self.root}/data/{name}")

    def _add(self, receipt: Receipt, size: int) -> Any:  # noqa: ANN401
        statuses = sorted(status for status, rows in receipt.statuses.items() if rows)
        stats: dict[str, Any] = {"numRecords": receipt.rows}
        if statuses:
            # Who asks for quarantined rows need not open the files that have none.
            stats["minValues"], stats["maxValues"] = {STATUS: statuses[0]}, {STATUS: statuses[-1]}
            stats["nullCount"] = {STATUS: 0}
        path = f"data/{receipt.name}"
        return self._library.transaction.AddAction(path, size, {}, _now_ms(), True, json.dumps(stats))

    def _commit(self, number: int, schema: pa.Schema, adds: list[Any], gone: list[str]) -> None:
        delta = self._library
        fields = delta.Schema.from_arrow(schema)
        properties = delta.CommitProperties(
            custom_metadata={"acsrSnapshot": number},
            app_transactions=[delta.Transaction(self.app_id, number)],
        )
        if self._table is None:
            delta.transaction.create_table_with_add_actions(
                self.root,
                fields,
                adds,
                storage_options=self._options,
                commit_properties=properties,
                description="Purified images; _acsr/ says how they were made.",
            )
            return
        table = self._table
        known = {field.name for field in table.schema().fields}
        if new := [field for field in fields.fields if field.name not in known]:
            # A commit of its own, without the transaction: rows come with the next one, or the next run's.
            table.alter.add_columns(new)
        removed = [delta.transaction.RemoveAction(path, True, _now_ms()) for path in gone]
        table.create_write_transaction([*adds, *removed], "append", fields, commit_properties=properties)


def storage_options(root: str, environment: Mapping[str, str], access: Access) -> dict[str, str]:
    """Return what `deltalake` has to be told of a store; the rest it takes from the environment itself.

    Args:
        root: URI or path of the table.
        environment: where an endpoint may be named.
        access: how the job reaches the output.

    Raises:
        StorageLocationError: by a profile, which `deltalake` does not know.
    """
    if not root.startswith(("s3://", "s3a://")):
        return {}
    if access.profile:
        raise StorageLocationError("--delta cannot use --storage.profile; name variables with keys instead")
    named = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    endpoint = access.endpoint_url or named or ""
    told = {
        "aws_endpoint_url": endpoint,
        "aws_region": access.region,
        "aws_access_key_id": access.access_key,
        "aws_secret_access_key": access.secret_key,
        "aws_session_token": access.token,
        "aws_allow_http": "true" if endpoint.startswith("http://") else "",
        "aws_skip_signature": "true" if access.anonymous else "",
    }
    return {name: value for name, value in told.items() if value}


def _footer_schema(uri: str) -> pa.Schema:
    def attempt() -> pa.Schema:
        with open_parquet(uri) as file:
            return file.schema_arrow

    return patiently(attempt, f"reading {uri}")


def _paths(table: Any) -> set[str]:  # noqa: ANN401
    """Return the paths of a table's files, which the log keeps with escapes."""
    return {unquote(path) for path in pa.table(table.get_add_actions())["path"].to_pylist()}


def _now_ms() -> int:
    return time.time_ns() // 10**6


def _load() -> ModuleType:
    try:
        library = importlib.import_module("deltalake")
        importlib.import_module("deltalake.transaction")
    except ImportError as error:
        raise MissingExtraError("Delta tables need a library: pip install 'acsr-ray[delta]'") from error
    return library
