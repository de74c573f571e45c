"""One row per measurement, as a table for people and as JSON for machines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from acsr_ray.benchmark.timing import alternate, timed
from acsr_ray.evaluation.tables import Table


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured: matrix products in float32 FLOP/s, copies in bytes/s."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Row:
    """One part at one size; times are of all cores (or the GPU) together."""

    part: str
    what: str
    side: int
    """Pixels."""
    images: int
    """Per run."""
    seconds: float
    """Per image."""
    peer: str = ""
    peer_seconds: float | None = None
    """Per image, of the fastest peer."""
    flop: float | None = None
    """Per image, counted."""
    bytes: float | None = None
    """Per image, read and written by the algorithm; caches may hold them."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer."""
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds

    def as_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """Return everything, with ratio, images per second and shares of the ceilings."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "images_per_second": 1 / self.seconds,
            "share_of_matmul": None if self.flop is None else self.flop / self.seconds / ceilings.flops,
            "share_of_memory": None if self.bytes is None else self.bytes / self.seconds / ceilings.bytes,
        }


def measure_ceilings(device: str) -> Ceilings:
    """Measure a large float32 matrix product and a copy that no cache holds, on all threads."""
    side = 8192 if device == "cuda" else 2048
    left, right = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    source = torch.rand(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = alternate(
        {
            "product": timed(lambda: left @ right, device),
            "copy": timed(lambda: target.copy_(source), device),
        },
        repeats=5,
    )
    return Ceilings(2 * side**3 / seconds["product"], 2 * source.nbytes / seconds["copy"])


def to_table(rows: Sequence[Row], ceilings: Ceilings, title: str) -> Table:
    """Return the rows as text."""
    caption = (
        f"Ceilings of this machine: {ceilings.flops / 1e9:.0f} GFLOP/s in float32 matrix products, "
        f"{ceilings.bytes / 1e9:.0f} GB/s in copies. FLOP and bytes are counted per image; bytes that caches "
        "hold may exceed the memory's ceiling."
    )
    header = (
        *("part", "what", "side", "images/s", "ms per image", "peer", "its ms", "ratio"),
        *("MFLOP", "of matmul", "MB", "of memory", "note"),
    )
    return Table(title, caption, header, tuple(_cells(row, ceilings) for row in rows))


def _cells(row: Row, ceilings: Ceilings) -> tuple[str, ...]:
    values = row.as_json(ceilings)

    def share(name: str) -> str:
        return "-" if values[name] is None else f"{100 * values[name]:.0f} %"

    return (
        row.part,
        row.what,
        str(row.side),
        f"{values['images_per_second']:.4g}",
        f"{1e3 * row.seconds:.3g}",
        row.peer or "-",
        "-" if row.peer_seconds is None else f"{1e3 * row.peer_seconds:.3g}",
        "-" if row.ratio is None else f"{row.ratio:.3g}",
        "-" if row.flop is None else f"{row.flop / 1e6:.3g}",
        share("share_of_matmul"),
        "-" if row.bytes is None else f"{row.bytes / 1e6:.3g}",
        share("share_of_memory"),
        row.note,
    )
