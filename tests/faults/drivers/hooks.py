"""Faults for drivers and workers of the kill suite, told by ACSR_FAULTS (JSON), unknown to the product.

    slow        {stage class: seconds before each call}
    kill_at     {"point": name, "count": n}: SIGKILL the driver when the n-th process passes a point of POINTS
    stop_at     {"point": name}: SIGSTOP the process that passes it first
    rows        {id: "exit" | "hang" | "memory" | "error"}: what an image with that id does to PurifyImages
    start       {stage class: "error" | "exit"}: what a stage does when it starts
    freeze      stage class: SIGSTOPs itself once, after a unit has ended and before the next begins
    full        n: the disk is full for every file of data/ after the n-th
    begun       file that gets "node time" for every unit that PurifyImages begins
    fallback    [ids]: images that the solver has no finite result for

Image ids are told by the first pixel's red and green, as `corpus.py` writes them.
"""

import contextlib
import errno
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS: dict[str, tuple[str, str, str]] = {
    # name -> (operation, pattern of the file, before or after)
    "lease taken": ("create", r"_acsr/lease/.*json", "after"),
    "claimed": ("write", r"_acsr/run\.json", "after"),
    "order closed": ("write", r"_acsr/run\.json", "after"),
    "quarantined": ("create", r"_acsr/quarantine/", "after"),
    "staged": ("link", r"/data/|/ready/", "before"),
    "linked": ("link", r"/data/|/ready/", "after"),
    "published": ("create", r"^(data|_acsr/ready)/", "after"),
    "before snapshot": ("create", r"_acsr/snapshots/", "before"),
    "snapshot staged": ("link", r"/_acsr/snapshots/", "before"),
    "snapshot linked": ("link", r"/_acsr/snapshots/", "after"),
    "superseded removed": ("remove", r"^data/", "after"),
    "parked half moved": ("link", r"/data/", "after"),
    "parked moved": ("move", r"", "after"),
    "snapshot removed": ("remove", r"_acsr/snapshots/", "after"),
    "progress told": ("write", r"_acsr/progress", "after"),
    "record begun": ("write", r"_acsr/runs/", "after"),
    "record staged": ("replace", r"record\.json", "before"),
    "reported": ("write", r"_acsr/runs/", "after"),
}


def faults() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(os.environ.get("ACSR_FAULTS", "{}"))
    return told


def image_id(pixels: bytes) -> int:
    return pixels[0] + 256 * pixels[1]


def install() -> None:
    """Patch this process as ACSR_FAULTS says; called by drivers, and by Ray in each of its workers."""
    told = faults()
    if "kill_at" in told:
        _at_point(told["kill_at"], _kill_driver)
    if "stop_at" in told:
        _at_point(told["stop_at"], lambda: os.kill(os.getpid(), signal.SIGSTOP))
    stages = {"slow": _slow, "start": _start}
    for key, patch in stages.items():
        for name, value in told.get(key, {}).items():
            patch(name, value)
    if "freeze" in told:
        _freeze(told["freeze"])
    if "full" in told:
        _full(told["full"])
    if "begun" in told:
        _begun(told["begun"])
    if "rows" in told:
        _rows({int(row): deed for row, deed in told["rows"].items()})
    if "fallback" in told:
        _fallback(set(told["fallback"]))


def _kill_driver() -> None:
    os.kill(int(os.environ["ACSR_DRIVER_PID"]), signal.SIGKILL)
    time.sleep(30)  # a worker dies with its driver; nothing may happen between


def _at_point(fault: dict[str, Any], deed: Callable[[], None]) -> None:
    operation, pattern, when = POINTS[fault["point"]]
    counter = Path(os.environ["ACSR_COUNTER"])

    def passed(path: str) -> None:
        if not re.search(pattern, path):
            return
        # One byte per passing, appended by whatever process it is.
        with counter.open("ab") as file:
            file.write(b".")
        if counter.stat().st_size == fault.get("count", 1):
            deed()

    def around(real: Callable[..., Any], told: Callable[..., str]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                passed(told(*args))
            result = real(*args, **kwargs)
            if when == "after":
                passed(told(*args))
            return result

        return patched

    from acsr_ray.storage import DiskStorage

    if operation == "replace":
        Path.replace = around(Path.replace, lambda source, target: str(target))  # type: ignore[method-assign]
    elif operation == "link":
        os.link = around(os.link, lambda source, target: str(target))
    else:
        setattr(DiskStorage, operation, around(getattr(DiskStorage, operation), lambda _, name, *rest: name))


def _stage_class(name: str) -> Any:
    from acsr_ray.purification import stages

    return getattr(stages, name)


def _slow(name: str, seconds: float) -> None:
    stage = _stage_class(name)
    real = stage.__call__

    def slowly(self: Any, table: Any) -> Any:
        time.sleep(seconds)
        return real(self, table)

    stage.__call__ = slowly


def _freeze(name: str) -> None:
    from acsr_ray.distributed.watching import WatchedChain

    real = WatchedChain.__call__

    def then_stopped(self: Any, table: Any) -> Any:
        result = real(self, table)
        if name in self.name:
            with contextlib.suppress(FileExistsError):
                Path(os.environ["ACSR_COUNTER"] + ".frozen").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGSTOP)
        return result

    WatchedChain.__call__ = then_stopped  # type: ignore[method-assign]


def _full(count: int) -> None:
    from acsr_ray.storage import DiskStorage

    real = DiskStorage._stage

    def stage(self: Any, data: bytes) -> Any:
        published = sum(1 for _ in Path(self.root, "data").rglob("*.parquet"))
        if published >= count and data.startswith(b"PAR1"):
            raise OSError(errno.ENOSPC, "No space left on device", "told by the test")
        return real(self, data)

    DiskStorage._stage = stage  # type: ignore[method-assign]


def _begun(path: str) -> None:
    import ray

    stage = _stage_class("PurifyImages")
    real = stage.__call__

    def noted(self: Any, table: Any) -> Any:
        with open(path, "a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()} {time.time()}\n")
        return real(self, table)

    stage.__call__ = noted


def _start(name: str, deed: str) -> None:
    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        if deed == "exit":
            os._exit(3)
        raise RuntimeError("the weights cannot be read")

    _stage_class(name).__init__ = start


def _rows(deeds: dict[int, str]) -> None:
    from acsr_ray.columns import PIXELS

    stage = _stage_class("PurifyImages")
    real = stage.__call__

    def guarded(self: Any, table: Any) -> Any:
        for pixels in table[PIXELS].to_pylist():
            deed = deeds.get(image_id(pixels)) if pixels is not None else None
            if deed == "exit":
                os.kill(os.getpid(), signal.SIGKILL)
            elif deed == "hang":
                time.sleep(3600)
            elif deed == "memory":
                raise MemoryError
            elif deed == "error":
                raise RuntimeError("odd image")
        return real(self, table)

    stage.__call__ = guarded


def _fallback(ids: set[int]) -> None:
    import torch

    from acsr_ray.purification.purifier import Purifier

    real = Purifier._rebuild

    def broken(self: Any, lowpass: Any, highpass: Any, index: Any) -> Any:
        rebuilt = real(self, lowpass, highpass, index)
        pixels = ((lowpass + highpass)[:, :2, 0, 0] * 255).round().long()
        found = torch.tensor([int(r) + 256 * int(g) in ids for r, g in pixels.tolist()])
        return torch.where(found.view(-1, 1, 1, 1), torch.nan, rebuilt)

    Purifier._rebuild = broken  # type: ignore[method-assign]
