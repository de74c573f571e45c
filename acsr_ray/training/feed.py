"""From decoded units to the batches of a worker, and the random numbers that belong to them."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acsr_ray.columns import IMAGE, LABEL
from acsr_ray.corpus.images import DecodeLimits, ImageError, Pixels, decode_image, to_unit_range
from acsr_ray.corpus.labelled import image_bytes, resize_pixels
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.corpus.units import Unit, read_unit
from acsr_ray.training.order import Order, Step, Window

AUGMENTATION, ATTACK, DROPOUT = 1, 2, 3
"""What random numbers are for; each purpose has its own."""
SHARED = 2**31
"""Stands for the lane in random numbers that all lanes share."""


@dataclass(frozen=True)
class Rows:
    """Decoded rows of one unit: `pixels` (n, S, S, 3) uint8, `labels` (n,) int64.

    A row that could not be decoded holds its neighbour's image and label, so that the order of training does
    not depend on decoding; `unreadable` counts them. Where no row of the unit could be, `source` is -1
    everywhere, and the rows are replaced when their window is put together.
    """

    pixels: Pixels
    labels: NDArray[np.int64]
    source: NDArray[np.int64]
    """(n,) row of the unit that the image was taken from."""
    unreadable: int


@dataclass(frozen=True)
class Batch:
    """The rows that one worker adds to a global step, lane after lane.

    `images` (n, 3, S, S) in [0, 1]; `labels` (n,); `units` (n,) and `rows` (n,) say where they are from.
    """

    step: Step
    lanes: tuple[int, ...]
    images: Tensor
    labels: Tensor
    units: NDArray[np.int64]
    rows: NDArray[np.int64]
    unreadable: int
    """Rows that could not be decoded, of the units loaded for this batch."""

    def with_images(self, images: Tensor) -> "Batch":
        """Return the batch with other images."""
        return replace(self, images=images)

    @contextlib.contextmanager
    def global_generator(self, seed: int, device: torch.device) -> Iterator[None]:
        """Give torch's global generator, which dropout draws from, numbers of this step and worker."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._entropy(seed, DROPOUT, self.lanes[0]))
            yield

    def _entropy(self, seed: int, purpose: int, lane: int) -> int:
        sequence = np.random.SeedSequence((seed, purpose, self.step.epoch, self.step.index, lane))
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)

    def shared_generator(self, seed: int, purpose: int) -> torch.Generator:
        """Return a generator of this step, the same in every worker."""
        return torch.Generator().manual_seed(self._entropy(seed, purpose, SHARED))

    def by_lane(self, seed: int, purpose: int) -> Iterator[tuple[slice, torch.Generator]]:
        """Yield the rows of each lane with the generator of its random numbers for a purpose.

        The numbers depend on lane and step alone, so they are the same for any number of workers, and after
        a kill.
        """
        share = len(self.labels) // len(self.lanes)
        for position, lane in enumerate(self.lanes):
            generator = torch.Generator().manual_seed(self._entropy(seed, purpose, lane))
            yield slice(position * share, (position + 1) * share), generator


def decode_unit(unit: Unit, image_size: int) -> Rows:
    """Read and decode one unit.

    Raises:
        CorpusError: a row without a label, or a missing column.
    """
    table = read_unit(unit)
    missing = {IMAGE, LABEL} - set(table.column_names)
    if missing:
        raise CorpusError(f"{unit.uri} has no column {', '.join(sorted(missing))}")
    if table[LABEL].null_count:
        raise CorpusError(f"{unit.uri} has rows without a label")
    pixels: dict[int, Pixels] = {}
    for row, data in enumerate(image_bytes(table[IMAGE])):
        try:
            pixels[row] = resize_pixels(decode_image(data, DecodeLimits()), image_size)
        except ImageError:
            continue
    labels = table[LABEL].to_numpy().astype(np.int64)
    if not pixels:
        nothing = np.zeros((table.num_rows, image_size, image_size, 3), np.uint8)
        return Rows(nothing, labels, np.full(table.num_rows, -1), table.num_rows)
    readable = np.array(sorted(pixels))
    source = readable[np.searchsorted(readable[1:], np.arange(table.num_rows), side="right")]
    stacked = np.stack([pixels[row] for row in source.tolist()])
    return Rows(stacked, labels[source], source, table.num_rows - len(readable))


def needed_units(events: Iterable[Window | Step]) -> Iterator[int]:
    """Yield the units in the order in which `batches` asks for them."""
    for event in events:
        if isinstance(event, Window):
            yield from event.units


Columns = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _in_order(window: Window, parts: Sequence[Rows]) -> Columns:
    """Return pixels, labels, units and rows of a window in training order."""
    units = [np.full(len(part.labels), unit) for unit, part in zip(window.units, parts, strict=True)]
    source = np.concatenate([part.source for part in parts])
    readable = np.flatnonzero(source >= 0)
    if not len(readable):
        raise CorpusError(f"not one of {len(source)} images in a row could be decoded")
    nearest = readable[np.searchsorted(readable[1:], np.arange(len(source)), side="right")]
    order = nearest[window.order]
    return (
        np.concatenate([part.pixels for part in parts])[order],
        np.concatenate([part.labels for part in parts])[order],
        np.concatenate(units)[order],
        source[order],
    )


def batches(
    order: Order, lanes: Sequence[int], events: Iterable[Window | Step], fetched: Iterator[Rows]
) -> Iterator[Batch]:
    """Yield a worker's batches.

    Args:
        order: of the training.
        lanes: that the worker serves.
        events: `Order.events` of these lanes, of one epoch or several.
        fetched: decoded units as `needed_units` of the same events lists them.
    """
    # What each lane has loaded and not given yet; it is dropped when an epoch ends.
    held: dict[int, Columns] = {}
    epoch, unreadable = -1, 0
    for event in events:
        if event.epoch != epoch:
            held, epoch = {}, event.epoch
        if isinstance(event, Window):
            parts = [next(fetched) for _ in event.units]
            unreadable += sum(part.unreadable for part in parts)
            loaded = _in_order(event, parts)
            left = held.get(event.lane)
            held[event.lane] = loaded if left is None else _joined([left, loaded])
            continue
        share = order.lane_batch
        pixels, labels, units, rows = _joined([_rows(held[lane], slice(0, share)) for lane in lanes])
        held = {lane: _rows(columns, slice(share, None)) for lane, columns in held.items()}
        yield Batch(
            event,
            tuple(lanes),
            torch.from_numpy(to_unit_range(pixels)),
            torch.from_numpy(labels),
            units,
            rows,
            unreadable,
        )
        unreadable = 0


def _rows(columns: Columns, chosen: slice) -> Columns:
    pixels, labels, units, rows = columns
    return pixels[chosen], labels[chosen], units[chosen], rows[chosen]


def _joined(parts: Sequence[Columns]) -> Columns:
    pixels, labels, units, rows = zip(*parts, strict=True)
    return np.concatenate(pixels), np.concatenate(labels), np.concatenate(units), np.concatenate(rows)
