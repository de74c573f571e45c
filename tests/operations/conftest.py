"""A stand-in for the stages on Ray, an S3 store, and corpora whose images are a few bytes."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.backends import get_backend
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from acsr_ray.columns import PURIFIED, QUARANTINED, REASON, STATUS
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.units import Unit, read_unit
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.purification.failures import failed_unit

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Refuses = Callable[[bytes, PurifyCorpusSettings], str | None]


def shard_bytes(numbers: Any) -> bytes:
    """Return a shard of images that are their own numbers as text."""
    cells = [{"bytes": b"image %d" % number, "path": f"{number}.png"} for number in numbers]
    table = pa.table({"key": list(numbers), "image": pa.array(cells, IMAGE_TYPE)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def write(path: Path, numbers: Any) -> Path:
    """Write a shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard_bytes(numbers))
    return path


@dataclass
class Stage:
    """Stands for the pipeline: images stay as they are, but for what `refuses` and `fails` say."""

    refuses: Refuses = lambda data, settings: None
    fails: Callable[[Unit], str | None] = lambda unit: None
    units: list[Unit] = field(default_factory=list)
    before_unit: Callable[[Unit], None] = lambda unit: None

    @property
    def done(self) -> list[tuple[str, int]]:
        """Which units were begun: shard and first row."""
        return [(unit.relative, unit.first) for unit in self.units]

    def pipelines(self) -> type:
        """Return a class to stand in for `Pipelines`."""
        stage = self

        class Standing:
            def __init__(self, settings: PurifyCorpusSettings, stop: Any, tally: Any = None) -> None:
                self.settings = settings

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                return

            def run(self, units: list[Unit], writer: dict[str, Any], storage: Any) -> Iterator[pa.Table]:
                for unit in units:
                    stage.units.append(unit)
                    stage.before_unit(unit)
                    kind = stage.fails(unit)
                    if kind is not None:
                        yield failed_unit(unit.to_json(), kind, "as told")
                    else:
                        yield stage.publish(unit, writer, self.settings)

        return Standing

    def publish(self, unit: Unit, writer: dict[str, Any], settings: PurifyCorpusSettings) -> pa.Table:
        table = read_unit(unit)
        cells = table["image"].to_pylist()
        reasons = [
            "null_image" if cell["bytes"] is None else self.refuses(cell["bytes"], settings) for cell in cells
        ]
        gone = [row for row, reason in enumerate(reasons) if reason]
        quarantine = pa.table(
            {
                "shard": pa.array([unit.uri] * len(gone), pa.string()),
                "row": pa.array([unit.first + row for row in gone], pa.int64()),
                "path": pa.array([cells[row]["path"] for row in gone], pa.string()),
                "reason": pa.array([reasons[row] for row in gone], pa.string()),
                "bytes": pa.array([cells[row]["bytes"] for row in gone], pa.large_binary()),
            }
        )
        images = [None if reason else cell for cell, reason in zip(cells, reasons, strict=True)]
        position = table.column_names.index("image")
        table = table.set_column(position, "image", pa.array(images, IMAGE_TYPE))
        statuses = [QUARANTINED if reason else PURIFIED for reason in reasons]
        table = table.append_column(STATUS, pa.array(statuses)).append_column(
            REASON, pa.array(reasons, pa.string())
        )
        receipt = Ledger(writer["output"]).publish(
            unit.output_name(writer["fingerprint"]),
            table,
            quarantine,
            parked=unit.relative in writer["parked"],
            first=unit.first,
            lease=writer["lease"],
        )
        told = {"name": receipt.name, "rows": receipt.rows, "receipt": json.dumps(asdict(receipt))}
        return pa.table({key: [value] for key, value in told.items()})


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Put the stand-in in the place of Ray."""
    stage = Stage()
    monkeypatch.setattr("acsr_ray.distributed.purify.Pipelines", stage.pipelines())
    monkeypatch.setattr("acsr_ray.corpus.night.IDLE_PAUSE_S", 0.0)
    return stage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards of ten rows; with four rows a unit, three units each."""
    for shard in range(3):
        write(tmp_path / "in" / f"part-{shard}.parquet", range(10 * shard, 10 * shard + 10))
    return tmp_path / "in"


@pytest.fixture(scope="session")
def write_numbers() -> Callable[[Path, Any], Path]:
    return write


@pytest.fixture(scope="session")
def numbers_shard() -> Callable[[Any], bytes]:
    return shard_bytes


@pytest.fixture
def options(source: Path, tmp_path: Path, tiny_bundle: Path) -> dict[str, Any]:
    """Settings of a purification of `source` to `out`."""
    return {"input": str(source), "output": str(tmp_path / "out"), "bundle": str(tiny_bundle), "unit_rows": 4}


def rows_of(output: Path | str) -> dict[int, tuple[bytes | None, str | None]]:
    """Return key -> (image, reason) of all visible rows, each of which is there once and listed."""
    ledger, found = Ledger(str(output)), {}
    assert ledger.published() == ledger.snapshot().names()
    for name in sorted(ledger.published()):
        for row in pq.read_table(io.BytesIO(ledger.storage.read(f"data/{name}"))).to_pylist():
            assert row["key"] not in found
            found[row["key"]] = row["image"] and row["image"]["bytes"], row["acsr_reason"]
    return found


@pytest.fixture(scope="session")
def visible() -> Callable[[Path | str], dict[int, tuple[bytes | None, str | None]]]:
    return rows_of


@dataclass
class Bucket:
    """A bucket of a store in memory."""

    client: Any

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket="corpus", Key=key, Body=data)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket="corpus", Key=key)["Body"].read()

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket="corpus", Key=key)

    def keys(self, prefix: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket="corpus", Prefix=prefix)
        return [entry["Key"] for entry in found.get("Contents", [])]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    # All servers of a process share one state.
    get_backend("s3").reset()
    host, port = moto.get_host_and_port()
    place = f"http://{host}:{port}"
    environment = {
        "AWS_ENDPOINT_URL": place,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # An instance remembers its endpoint, which was another test's.
    S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=place, region_name="eu-central-1")
    client.create_bucket(Bucket="corpus", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    yield Bucket(client)
    moto.stop()
