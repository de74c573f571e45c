"""Names of Parquet and Ray columns, statuses and reasons: the vocabulary shared by all stages.

Input that has a column starting with `acsr_` is refused, so ours never meet a column of the corpus. Those
that start with `acsr_tmp_` only travel between the stages of the pipeline.
"""

import pyarrow as pa

IMAGE = "image"
LABEL = "label"

STATUS = "acsr_status"
REASON = "acsr_reason"
CLASS = "acsr_class"
CLUSTER = "acsr_cluster"
DISTANCE = "acsr_distance"
RESIDUAL = "acsr_residual"
DOUBT = "acsr_doubt"
ORIGINAL = "acsr_original"
PREFIX = "acsr_"

PURIFIED = "purified"
PASSED_THROUGH = "passed_through"
QUARANTINED = "quarantined"
STATUSES = (PURIFIED, PASSED_THROUGH, QUARANTINED)

OUTCOME = pa.schema(
    [
        (STATUS, pa.string()),
        (REASON, pa.string()),
        (CLASS, pa.int32()),
        (CLUSTER, pa.int32()),
        (DISTANCE, pa.float32()),
        (RESIDUAL, pa.float32()),
    ]
)
"""What purification appends to every row; the last four are null when the row is quarantined."""

UNIT = "acsr_tmp_unit"
PIXELS = "acsr_tmp_pixels"
HEIGHT = "acsr_tmp_height"
WIDTH = "acsr_tmp_width"
LATENT = "acsr_tmp_latent"
INDEX = "acsr_tmp_index"
FAILED = "acsr_tmp_failed"
"""Only in the table of a unit that failed: a `FailureKind` of `acsr_ray.purification.failures`."""
DETAIL = "acsr_tmp_detail"
TRAVELLING = (UNIT, PIXELS, HEIGHT, WIDTH, LATENT, INDEX)
FACTS = "acsr_tmp_facts"
"""What was noted of a unit so far, as JSON: `UnitFacts` of `acsr_ray.corpus.facts`. Stages do not see it."""
