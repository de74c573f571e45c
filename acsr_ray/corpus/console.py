"""A run's progress for people: a bar on a terminal, elsewhere a line of the log now and then."""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

logger = logging.getLogger(__name__)

LINE_SECONDS = 30.0
"""Between two lines of a log."""
BAR_WIDTH = 24
COLUMNS = 80
"""Of a terminal of unknown size."""


class Console(Protocol):
    """Where progress is shown."""

    def show(self, progress: Mapping[str, Any]) -> None:
        """Show it, as `RunTally.progress` gives it; called about once a second."""

    def close(self, progress: Mapping[str, Any]) -> None:
        """Show the last of it."""


def open_console(stream: TextIO | None = None) -> Console:
    """Return a bar where a stream (standard error) is a terminal that can redraw a line, else log lines."""
    stream = stream or sys.stderr
    is_terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Bar(stream) if is_terminal else Lines()


class Lines:
    """Log lines, the first after the first `LINE_SECONDS`.

    Args:
        clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told = clock()

    def show(self, progress: Mapping[str, Any]) -> None:
        """Log a line if it is time."""
        now = self._clock()
        if now - self._told >= LINE_SECONDS:
            self._told = now
            logger.info("%s", told(progress))

    def close(self, progress: Mapping[str, Any]) -> None:
        """Log nothing: the job prints a summary."""


class Bar:
    """One line of a terminal, drawn again and again; log lines push it down.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_drawn = False
        # Whoever logs to the terminal first wipes the bar away; the next drawing brings it back.
        self._handlers = list(logging.getLogger().handlers)
        for handler in self._handlers:
            handler.addFilter(self._wiped)

    def show(self, progress: Mapping[str, Any]) -> None:
        """Draw the bar."""
        columns = self._columns() - 1
        done, expected = progress["images_done"], progress["images_expected"]
        full = BAR_WIDTH * min(done, expected) // expected if expected else 0
        line = f"[{'#' * full}{'.' * (BAR_WIDTH - full)}] {told(progress)}"
        self._write(f"\r{line[:columns]}\x1b[K")
        self._is_drawn = True

    def close(self, progress: Mapping[str, Any]) -> None:
        """Draw it for the last time and leave it."""
        self.show(progress)
        self._write("\n")
        self._is_drawn = False
        for handler in self._handlers:
            handler.removeFilter(self._wiped)

    def _wiped(self, record: logging.LogRecord) -> bool:
        if self._is_drawn:
            self._write("\r\x1b[K")
            self._is_drawn = False
        return True

    def _columns(self) -> int:
        try:
            # A terminal that does not know its size says 0.
            return os.get_terminal_size(self._stream.fileno()).columns or COLUMNS
        except (OSError, ValueError):
            return COLUMNS

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The terminal went away, or somebody closed the stream; the run goes on.
            self._is_drawn = False


def told(progress: Mapping[str, Any]) -> str:
    """Return progress as one line of text."""
    done, planned, expected = (progress[f"images_{name}"] for name in ("done", "planned", "expected"))
    if not planned:
        return f"getting ready, {_duration(progress['elapsed_s'])}"
    about = "" if expected == planned else "about "
    eta = progress["eta_s"]
    left = "time left unknown" if eta is None else f"{_duration(eta)} left"
    return (
        f"{done:,} of {about}{expected:,} images ({100 * done / expected:.1f} %), "
        f"{progress['images_per_s']:.1f}/s, {left}, "
        f"{100 * progress['quarantine_rate']:.2f} % quarantined"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
