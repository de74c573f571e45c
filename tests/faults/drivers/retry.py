"""Run the publish path of a retry in this one process, quick enough to be killed at every point of it.

    retry.py INPUT OUTPUT LIMIT

Images whose number ends in 3 are refused as too large, unless the limit on an image's side is above 20000;
those whose number ends in 8 run out of time, unless the limit is above 16384. Such a limit makes it a retry.
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

from acsr_ray.artifacts import json_digest
from acsr_ray.columns import PURIFIED, QUARANTINED, REASON, STATUS
from acsr_ray.config import AcsrError
from acsr_ray.corpus.changes import list_corpus
from acsr_ray.corpus.lease import Lease
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.night import Night, NightSettings
from acsr_ray.corpus.retry_request import OrdinaryRun, RetryRequest
from acsr_ray.corpus.stopping import stop_request
from acsr_ray.corpus.units import Unit, UnitPlan, read_unit

USUAL_SIDE, HIGH_SIDE = 16384, 20000


def reason(key: str, side: int) -> str | None:
    if key.endswith("3") and side <= HIGH_SIDE:
        return "too_large"
    return "decoder_timeout" if key.endswith("8") and side <= USUAL_SIDE else None


def main(source: str, output: str, side: int) -> None:
    ledger = Ledger(output)
    deciding = {"decode": {} if side == USUAL_SIDE else {"max_side": side}}
    bound = {**deciding, "input": source}
    asked = NightSettings(UnitPlan(unit_rows=5), json_digest(deciding), wave_units=3)
    with stop_request() as stop, Lease(ledger.storage, stale_s=3.0, beat_s=0.5) as lease:
        order = RetryRequest(frozenset()) if side > USUAL_SIDE else OrdinaryRun(None, anew=False)
        order.check(ledger, bound)
        asked = order.begin(ledger, asked, bound, deciding)

        def publish(units: list[Unit], parked: frozenset[str]) -> Iterator[pa.Table]:
            for unit in units:
                table = read_unit(unit)
                reasons = [reason(key, side) for key in table["image_id"].to_pylist()]
                images = [
                    None if gone else cell
                    for gone, cell in zip(reasons, table["image"].to_pylist(), strict=True)
                ]
                rows = [row for row, gone in enumerate(reasons) if gone]
                kept = pa.table(
                    {"row": [unit.first + row for row in rows], "reason": [reasons[row] for row in rows]}
                )
                table = table.set_column(1, "image", pa.array(images, table.schema.field("image").type))
                statuses = [QUARANTINED if gone else PURIFIED for gone in reasons]
                table = table.append_column(STATUS, pa.array(statuses))
                table = table.append_column(REASON, pa.array(reasons, pa.string()))
                receipt = ledger.publish(
                    unit.output_name(asked.fingerprint),
                    table,
                    kept,
                    parked=unit.relative in parked,
                    first=unit.first,
                    lease=lease.number,
                )
                told = {"name": receipt.name, "rows": receipt.rows, "receipt": json.dumps(asdict(receipt))}
                yield pa.table({key: [value] for key, value in told.items()})

        night = Night(asked, ledger, lease, stop, publish)
        night.run(list_corpus(source))
        order.finish(ledger)
        summary = night.summary(1.0)
    print(json.dumps(summary))


hooks.install()
try:
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
except AcsrError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
