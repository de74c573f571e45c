"""A small output as purification leaves it, its record, and a headless browser to look at the page with.

The browser is spoken to over two pipes, in its own protocol: no driver, no port.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.columns import CLASS, CLUSTER, DISTANCE, PURIFIED, RESIDUAL, STATUS, UNIT
from acsr_ray.corpus.changes import ShardWork, inspect_shard, list_corpus
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.snapshot import Receipt, Snapshot, total
from acsr_ray.corpus.sources import ImageFolder
from acsr_ray.corpus.units import UnitPlan, folder_units
from acsr_ray.purification.bundle import bundle_digest
from acsr_ray.purification.stages import (
    DecodeImages,
    EncodeImages,
    PurifyImages,
    ReadUnits,
    SelectClusters,
    WriteUnits,
)

FINGERPRINT = "f" * 64
HOSTILE = (
    """"><script>alert('1')</script><img src=http://127.0.0.1:9/x onerror=alert(1)>\u202egnp.\x00&amp;"""
)
"""A name that breaks out of attributes and elements, loads something, and is not what it looks like."""
UNIT_ROWS = 12
STAGES = ("read", "decode", "encode", "select", "purify", "write")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
LAUNCH = """
import fcntl, os, sys
# High ones first, so that neither is overwritten before it is copied.
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 20) for number in sys.argv[1:3]]
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
SECONDS = 60.0
# /usr/bin/chromium of Debian and Ubuntu, and what others call it.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Purified:
    """An output, and the corpus it was made of."""

    ledger: Ledger
    corpus: Path
    bundle: Path

    @property
    def output(self) -> Path:
        return Path(self.ledger.output)

    def tables(self) -> list[pa.Table]:
        """Return what `data/` holds."""
        names = sorted(self.ledger.published())
        return [pq.read_table(self.output / "data" / name) for name in names]


class Purify:
    """Purifies without Ray, and commits what it made as a run does."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        # Once for all outputs: each decoder is a process, which takes a second to start.
        self._stages = (
            ReadUnits(),
            DecodeImages("image", DecodeLimits(max_side=64)),
            EncodeImages(str(bundle), "cpu", 64, threads=1),
            SelectClusters(str(bundle), threads=1),
            PurifyImages(str(bundle), "cpu", 64, threads=1),
        )

    def __call__(self, corpus: Path, output: str, *, keep_original: bool = False) -> Purified:
        stages = (*self._stages, WriteUnits(output, FINGERPRINT, "image", keep_original))
        ledger = Ledger(output)
        bound = {
            "bundle_digest": bundle_digest(self.bundle),
            "image_column": "image",
            "decode": {"max_side": 64},
            "input": str(corpus),
        }
        ledger.claim(bound, json.loads((self.bundle / "manifest.json").read_text()))
        entries, refused = {}, {}
        source, plan = list_corpus(str(corpus)), UnitPlan(unit_rows=UNIT_ROWS)
        if isinstance(source, ImageFolder):
            units = list(folder_units(source, plan))
            works = [ShardWork(units[0].relative, units[0].uri, "", "", FINGERPRINT, units)]
        else:
            works = [inspect_shard(shard, plan, Snapshot(), FINGERPRINT) for shard in source]
        for work in works:
            if not hasattr(work, "units"):
                refused[work.uri] = work.reason
                continue
            for unit in work.units:
                table = pa.table({UNIT: [unit.to_json()]})
                for stage in stages:
                    table = stage(table)
                receipt = Receipt(**json.loads(table["receipt"][0].as_py()))
                work.receipts[receipt.name] = receipt
            entries[work.relative] = work.entry()
        ledger.commit(Snapshot(1, entries, refused))
        return Purified(ledger, corpus, self.bundle)


@pytest.fixture(scope="session")
def purify(tiny_bundle: Path) -> Purify:
    return Purify(tiny_bundle)


@pytest.fixture(scope="session")
def hostile_corpus(tmp_path_factory, smooth_pixels, encoded, hf_table, write_parquet) -> Path:
    """Two shards of 16 x 16 images, some refused, under hostile names and keys, and one that is no shard."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, name in enumerate(("plain", "<script>alert(2)<|script>")):
        cells = [encoded(image) for image in smooth_pixels(30, 16, 16, seed=number)]
        cells[3], cells[7], cells[11] = None, b"", b"SECRET-OF-A-REFUSED-IMAGE"
        table = hf_table(cells)
        images = table["image"].to_pylist()
        for row in range(number, 30, 2):
            images[row]["path"] = f"{row}{HOSTILE}"
        position = table.column_names.index("image")
        table = table.set_column(position, table.schema.field("image"), pa.array(images, table["image"].type))
        write_parquet(folder / f"{name}.parquet", table, row_group_size=8)
    (folder / "broken<b>.parquet").write_bytes(b"PAR1 this is none")
    return folder


@pytest.fixture(scope="session")
def purified(purify, hostile_corpus, tmp_path_factory) -> Purified:
    return purify(hostile_corpus, str(tmp_path_factory.mktemp("purified") / "out"))


def make_record(purified: Purified, **changes: Any) -> dict[str, Any]:
    """Return the record of a run that made all of an output, as a run writes it; None removes a field."""
    rows = pa.concat_tables(
        [table.select([STATUS, CLASS, CLUSTER, DISTANCE, RESIDUAL]) for table in purified.tables()]
    ).to_pylist()
    solved = [row for row in rows if row[STATUS] == PURIFIED]
    snapshot = purified.ledger.snapshot()
    sums = total(snapshot.receipts())
    images, seconds = len(rows), 84.0
    # Ray starts, the workers warm up, then all is steady but for one pause.
    paces = np.r_[np.zeros(8), np.linspace(0.2, 1, 12), np.ones(30), np.zeros(5), np.ones(29)]
    done = np.rint(images * np.cumsum(paces) / paces.sum())
    record = {
        "schema_version": 1,
        "run": "20260301T020304Z",
        "started_at": "2026-03-01T02:03:04Z",
        "elapsed_s": seconds,
        "outcome": "done",
        "detail": "",
        "input": str(purified.corpus),
        "output": purified.ledger.output,
        "bundle": str(purified.bundle),
        "settings": {"bundle": str(purified.bundle), "unit_rows": UNIT_ROWS, "decode": {"max_side": 64}},
        "images": images,
        "units": len(purified.tables()),
        "statuses": dict(Counter(row[STATUS] for row in rows)),
        "reasons": sums["quarantined"],
        "clusters": dict(Counter(f"{row[CLASS]}/{row[CLUSTER]}" for row in solved)),
        "residual": _bins([row[RESIDUAL] for row in solved], 0.6),
        "distance": _bins([row[DISTANCE] for row in solved], 30.0),
        "stage_seconds": {
            "read": 1.2,
            "decode": 6.5,
            "encode": 21.0,
            "select": 0.7,
            "purify": 92.5,
            "write": 8.1,
        },
        "timeline": [[float(second + 1), int(count)] for second, count in enumerate(done)],
        "retries": 1,
        "batch_fill": 0.83,
        "refused_shards": dict(snapshot.refused),
        "failed_units": {},
        "removed_shards": [],
        "corpus": {
            "images": sums["rows"],
            "statuses": sums["statuses"],
            "quarantined": sums["quarantined"],
        },
        "plan": {
            "schema_version": 1,
            "images": images,
            "images_to_do": images,
            "bytes": 123456,
            "shards": 2,
            "problems": [],
            "sample": {"images": images, "seconds": 9.0},
            "cluster": {"cpus": 2.0, "gpus": 0.0},
            "estimate": {
                "seconds": {"low": 60.0, "mean": 75.0, "high": 95.0},
                "images_per_s": {"low": images / 95, "mean": images / 75, "high": images / 60},
            },
        },
        **changes,
    }
    return {key: value for key, value in record.items() if value is not None}


def _bins(values: list[float], most: float) -> dict[str, list[float]]:
    edges = np.linspace(0, most, 41)
    counts, _ = np.histogram(np.clip(values, 0, most), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def keep_record(purified: Purified, record: dict[str, Any]) -> str:
    """Write a record where a run does, and return the run."""
    run: str = record["run"]
    data = json.dumps(record).encode("utf-8", "surrogatepass")
    purified.ledger.storage.write(f"_acsr/runs/{run}/record.json", data)
    return run


@pytest.fixture(scope="session")
def record_of() -> Callable[..., dict[str, Any]]:
    return make_record


@pytest.fixture(scope="session")
def keep() -> Callable[..., str]:
    return keep_record


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


class Browser:
    """One tab; collects what the page asks the network for and what it writes to the console.

    Args:
        program: the browser.
        profile: new, empty folder.
    """

    def __init__(self, program: str, profile: Path) -> None:
        # The browser reads from its descriptor 3 and writes to its 4.
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()

        arguments = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(commands), str(answers), *arguments],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._unread, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.messages: list[str] = []
        self._loaded = False
        tabs = self.call("Target.getTargets")["targetInfos"]
        tab = next(one["targetId"] for one in tabs if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{part}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path) -> None:
        """Load a file and wait until all of it is there."""
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._next()

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression, whatever the page's policy on scripts."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, *, dark: bool = False, media: str = "") -> None:
        """Show the page at a width in pixels, in the light or the dark, on a screen or as `print`."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def look(self, *, whole: bool = False) -> bytes:
        """Return a PNG of what is in view, or of the whole page."""
        if not whole:
            return base64.b64decode(self.call("Page.captureScreenshot")["data"])
        width, tall = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _next(self) -> dict[str, Any]:
        ends = time.monotonic() + SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, ends - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._from, 2**16)
            assert data, "the browser ended"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install -y chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened
