"""A run under observation: its record and progress are written, and shown, while it works and when it ends.

A run that ends in whatever way says so in its record; one that is killed is left as `running`, with the time
of its last word. Nothing here fails a run, and nothing makes it wait longer than `CLOSE_SECONDS`.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from acsr_ray.config import AcsrError, ResumableStop
from acsr_ray.corpus.console import Console, open_console
from acsr_ray.corpus.differences import ShardChanges
from acsr_ray.corpus.records import PLAN, PROGRESS, RUNS
from acsr_ray.corpus.run_record import MOST_NAMED, Outcome, RunAbout, RunTally
from acsr_ray.corpus.side_files import SideWriter
from acsr_ray.storage import Storage, StorageError

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
SHOWN = 20
"""Shards of each kind that the log names."""
CLOSE_SECONDS = 10.0
"""How long an ending run tries to write its last record: one that is lost leaves it as running."""
STOP_SECONDS = 3.0
"""The same for a run that was stopped, which has half a minute in all."""


@dataclass(frozen=True)
class Pace:
    """Seconds between two writings; an object store is paid per request."""

    progress: float = 5.0
    record: float = 30.0


def record_file(run: str) -> str:
    """Return the name of a run's record in its output."""
    return f"{RUNS}/{run}/record.json"


def read_plan(storage: Storage) -> dict[str, Any] | None:
    """Return what was planned for an output, None where nothing was, or where it cannot be read."""
    try:
        content = json.loads(storage.read(PLAN))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, StorageError) as error:
        logger.warning("%s/%s cannot be read: %s", storage.root, PLAN, error)
        return None
    return content if isinstance(content, dict) else None


class ObservedRun:
    """A context manager around a run; its `record` is what the run's file holds at the end.

    Args:
        about: the run.
        tally: told by the run.
        storage: of the output.
        is_ours: whether the run still may write there.
        console: where progress is shown; as `open_console` finds unless given.
        pace: how often files are written.
    """

    def __init__(
        self,
        about: RunAbout,
        tally: RunTally,
        storage: Storage,
        *,
        is_ours: Callable[[], bool] = lambda: True,
        console: Console | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.record: dict[str, Any] = {}
        self._about, self._tally, self._pace = about, tally, pace or Pace()
        self._corpus: Mapping[str, Any] | None = None
        self._changes: ShardChanges | None = None
        self._console = console or open_console()
        self._writer = SideWriter(storage, is_ours)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_telling, daemon=True, name="progress")

    def __enter__(self) -> Self:
        self._write_progress("running")
        self._write_record("running", "")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join(STOP_SECONDS)
        outcome, detail = outcome_of(error)
        self._corpus, self._changes = self._tally.corpus(), self._tally.changes()
        # The record first: it is what others go by, if there is time for one of them only.
        self._write_record(outcome, detail)
        progress = self._write_progress(outcome)
        self._tally.listener.tick(progress)
        self._console.close(progress)
        self._log_changes()
        self._writer.close(STOP_SECONDS if outcome == "stopped" else CLOSE_SECONDS)

    def _keep_telling(self) -> None:
        told = recorded = time.monotonic()
        while not self._closing.wait(TICK_SECONDS):
            now = time.monotonic()
            progress = self._tally.progress(self._about.run, "running")
            self._console.show(progress)
            self._tally.listener.tick(progress)
            if now - told >= self._pace.progress:
                told = now
                self._writer.put(PROGRESS, _json(progress))
            if now - recorded >= self._pace.record:
                recorded = now
                # Once: summing up all receipts costs seconds where there are millions of them.
                self._corpus = self._corpus or self._tally.corpus()
                self._write_record("running", "")

    def _write_progress(self, outcome: Outcome) -> dict[str, Any]:
        progress = self._tally.progress(self._about.run, outcome)
        self._writer.put(PROGRESS, _json(progress))
        return progress

    def _write_record(self, outcome: Outcome, detail: str) -> None:
        self.record = self._tally.record(self._about, outcome, detail, self._corpus, self._changes)
        self._writer.put(record_file(self._about.run), _json(self.record))

    def _log_changes(self) -> None:
        for kind in ("new", "changed", "removed"):
            names, number = self.record[f"{kind}_shards"], self.record[f"{kind}_shards_total"]
            if not number:
                continue
            more = ""
            if number > SHOWN:
                where = f"{self._about.output}/{record_file(self._about.run)}"
                more = f" (the first {SHOWN}; the first {MOST_NAMED} are in {where})"
            logger.info("%d shards %s: %s%s", number, kind, ", ".join(names[:SHOWN]), more)


def outcome_of(error: BaseException | None) -> tuple[Outcome, str]:
    """Return how a run that ended with an error, or without one, ended, and why."""
    if error is None:
        return "done", ""
    if isinstance(error, ResumableStop):
        return "stopped", str(error)
    if not isinstance(error, Exception):
        # Ctrl-C above all: nothing is wrong, and the same command resumes.
        return "stopped", f"interrupted ({type(error).__name__})"
    return "failed", str(error) if isinstance(error, AcsrError) else f"{type(error).__name__}: {error}"


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
