"""Timed runs of several sides in turns, in this process or in several."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

Side = Callable[[], float]
"""Does its work once and returns the seconds that count."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def timed(work: Callable[[], object], device: str = "cpu") -> Side:
    """Return a side that counts all of `work`, to the end of what it started on a GPU."""

    def run() -> float:
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return run


def alternate(sides: Mapping[str, Side], repeats: int) -> dict[str, float]:
    """Run all sides in turns and return the median seconds of each; a first turn only warms up."""
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side())
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def in_processes(make: Callable[..., Side], payloads: Sequence[tuple[Any, ...]]) -> Iterator[Side]:
    """Yield a side that runs make(*payload)() in one process per payload at once and counts the slowest.

    Args:
        make: a function of a module, which each process calls once.
        payloads: its arguments in each process, picklable.
    """
    context = multiprocessing.get_context("spawn")
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    # Read by libraries when a process loads them.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    workers, pipes = [], []
    try:
        for payload in payloads:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, make, payload), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        _restore(before)

        def run() -> float:
            for pipe in pipes:
                pipe.send(True)
            return max(float(pipe.recv()) for pipe in pipes)

        yield run
    finally:
        _restore(before)
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join()


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _serve(pipe: Connection, make: Callable[..., Side], payload: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    side = make(*payload)
    pipe.send(True)
    try:
        while pipe.recv():
            pipe.send(side())
    except EOFError:
        return
