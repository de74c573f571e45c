"""Run the publish path of a purification in this one process, quick enough to be killed at every point of it.

    publish.py INPUT OUTPUT

The images stay as they are; every fifth row is quarantined.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

os.environ["ACSR_DRIVER_PID"] = str(os.getpid())
sys.path.insert(0, str(Path(__file__).parent))

import hooks
import pyarrow as pa

from acsr_ray.columns import PURIFIED, QUARANTINED, REASON, STATUS
from acsr_ray.config import AcsrError
from acsr_ray.corpus.changes import list_corpus
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.night import Night, NightSettings
from acsr_ray.corpus.observing import ObservedRun
from acsr_ray.corpus.run_record import RunAbout, RunTally
from acsr_ray.corpus.stopping import stop_request
from acsr_ray.corpus.units import Unit, UnitPlan, read_unit
from acsr_ray.storage import patiently

FINGERPRINT = "0123456789abcdef" * 4


def main(source: str, output: str) -> None:
    ledger = Ledger(output)
    with stop_request() as stop, Lease(ledger.storage, stale_s=3.0, beat_s=0.5) as lease:
        ledger.claim({"bound": 1})

        def publish(units: list[Unit], parked: frozenset[str]) -> Iterator[pa.Table]:
            for unit in units:
                table = patiently(lambda unit=unit: read_unit(unit), f"reading {unit.uri}")
                bad = [(unit.first + row) % 5 == 0 for row in range(table.num_rows)]
                images = [
                    None if gone else cell for gone, cell in zip(bad, table["image"].to_pylist(), strict=True)
                ]
                kept = table.filter(pa.array(bad))
                table = table.set_column(1, "image", pa.array(images, table.schema.field("image").type))
                table = table.append_column(
                    STATUS, pa.array([QUARANTINED if gone else PURIFIED for gone in bad])
                )
                table = table.append_column(
                    REASON, pa.array(["decode_error" if gone else None for gone in bad], pa.string())
                )
                receipt = ledger.publish(
                    unit.output_name(FINGERPRINT),
                    table,
                    kept,
                    parked=unit.relative in parked,
                    first=unit.first,
                    lease=lease.number,
                )
                told = {"name": receipt.name, "rows": receipt.rows, "receipt": json.dumps(asdict(receipt))}
                yield pa.table({key: [value] for key, value in told.items()})

        settings = NightSettings(UnitPlan(unit_rows=10), FINGERPRINT, wave_units=2)
        tally = RunTally()
        about = RunAbout.now(lease.number, input=source, output=output, bundle="none", settings={})
        with ObservedRun(about, tally, ledger.storage, is_ours=lambda: not lease.is_lost):
            night = Night(settings, ledger, lease, stop, publish, tally)
            night.run(list_corpus(source))
        summary = night.summary(1.0)
    print(json.dumps(summary))


hooks.install()
try:
    main(sys.argv[1], sys.argv[2])
except AcsrError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
