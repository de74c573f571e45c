"""Facts of units: what they count is what the columns hold, and they add up."""

import numpy as np
import pyarrow as pa
import pytest

from acsr_ray.columns import FACTS, OUTCOME, PASSED_THROUGH, PURIFIED, QUARANTINED
from acsr_ray.corpus.facts import (
    DISTANCE_EDGES,
    RESIDUAL_EDGES,
    UnitFacts,
    facts_in,
    outcome_facts,
    with_facts,
    without_facts,
)


def outcome(rows=400, seed=0):
    """Return random outcome columns, with values beyond the last edges, on edges, nulls and a NaN."""
    generator = np.random.default_rng(seed)
    status = generator.choice([PURIFIED, PASSED_THROUGH, QUARANTINED], rows, p=[0.7, 0.1, 0.2])
    gone = status == QUARANTINED
    reason = [
        "decode_error" if out else "solver_fallback" if generator.random() < 0.1 else None for out in gone
    ]
    residual = generator.uniform(0, 0.7, rows).astype(np.float32)
    residual[:3] = 0.25, 0.5, np.nan
    distance = generator.uniform(0, 90, rows).astype(np.float32)
    distance[:3] = 0.0, 64.0, np.inf
    columns = [
        status.tolist(),
        reason,
        generator.integers(0, 3, rows),
        generator.integers(0, 2, rows),
        distance,
        residual,
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, OUTCOME, strict=True)]
    keep = pa.array([None if out else row for row, out in enumerate(gone)])
    return pa.table([*arrays[:2], *(array.take(keep) for array in arrays[2:])], schema=OUTCOME)


def test_counts_are_those_of_the_columns():
    table = outcome()
    facts, frame = outcome_facts(table), table.to_pandas()
    assert facts.statuses == frame.acsr_status.value_counts().to_dict()
    assert facts.images == len(frame)
    assert facts.reasons == frame.acsr_reason.value_counts().to_dict()
    assert {"solver_fallback", "decode_error"} == set(facts.reasons)
    there = frame.dropna(subset=["acsr_class"]).astype({"acsr_class": int, "acsr_cluster": int})
    names = there.acsr_class.astype(str) + "/" + there.acsr_cluster.astype(str)
    assert facts.clusters == names.value_counts().to_dict()
    for column, counts, edges in (
        ("acsr_residual", facts.residual, RESIDUAL_EDGES),
        ("acsr_distance", facts.distance, DISTANCE_EDGES),
    ):
        values = table[column].drop_null().to_numpy().astype(np.float64)
        values = np.clip(values[~np.isnan(values)], None, np.nextafter(edges[-1], 0))
        assert counts == tuple(np.histogram(values, edges)[0].tolist())
        assert sum(counts) == len(values)
        assert counts[-1] > 10, "what is beyond the last edge is in the last bin"


def test_bins_ascend_and_have_fixed_edges():
    assert (RESIDUAL_EDGES[0], RESIDUAL_EDGES[1], RESIDUAL_EDGES[-1], len(RESIDUAL_EDGES)) == (
        0,
        0.01,
        0.5,
        51,
    )
    assert (DISTANCE_EDGES[0], DISTANCE_EDGES[1], DISTANCE_EDGES[-1], len(DISTANCE_EDGES)) == (0, 1, 64, 65)


def test_facts_of_parts_are_those_of_the_whole():
    table = outcome(100)
    costs = UnitFacts(seconds={"EncodeImages": 1.5}, rows_given=60, rows_room=64)
    parts = [outcome_facts(table.slice(first, 30)) for first in range(0, 100, 30)]
    total = sum(parts, costs)
    assert total == outcome_facts(table) + costs
    assert total.batch_fill == 60 / 64
    assert sum([costs, costs], UnitFacts()).seconds == {"EncodeImages": 3.0}
    assert UnitFacts().batch_fill is None


def test_facts_travel_as_one_value_of_a_table():
    facts = outcome_facts(outcome(50)) + UnitFacts(seconds={"ReadUnits": 0.25})
    assert UnitFacts.from_json(facts.to_json()) == facts
    table = pa.table({"row": range(1000)})
    noted = with_facts(with_facts(table, UnitFacts()), facts)
    assert noted.column_names == ["row", FACTS]
    assert noted.nbytes - table.nbytes < 4 * 1000 + 2000
    assert facts_in(noted) == facts_in(pa.concat_tables([noted.slice(7, 5), noted.slice(90)])) == facts
    assert without_facts(noted).equals(table)
    assert facts_in(table) == UnitFacts()


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    facts = outcome_facts(outcome(50).slice(10, rows))
    assert (facts.images, len(facts.residual), len(facts.distance)) == (rows, 50, 64)
