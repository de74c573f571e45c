"""One line of an examination."""

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do where it is not well.

    Args:
        name: of what was looked at.
        level: `ok`, `warn` (a job runs, and somebody should know) or `fail` (no job will run).
        told: what was found.
        hint: what to do; "" where there is nothing to do.
    """

    name: str
    level: Level
    told: str
    hint: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return a JSON value."""
        return asdict(self)
