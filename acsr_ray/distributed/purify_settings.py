"""Settings of a purification, and what of them decides the output."""

from typing import Any, ClassVar

from pydantic import Field

from acsr_ray.columns import IMAGE
from acsr_ray.config import Device
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.isolated import DecoderSettings
from acsr_ray.corpus.sources import CorpusError, absolute_uri
from acsr_ray.corpus.units import UnitPlan
from acsr_ray.distributed.runtime import (
    RaySettings,
)
from acsr_ray.filesystems import StoreSettings
from acsr_ray.purification.bundle import (
    ALGORITHM_VERSION,
    DEFAULT_BUNDLE,
    bundle_digest,
    load_bundle,
)
from acsr_ray.purification.doubt_stage import doubt_settings
from acsr_ray.purification.options import Precision, PurifyOptions, Reconstruction, Strength
from acsr_ray.purification.stages import (
    OnFailure,
)


class PurifyCorpusSettings(StoreSettings):
    """Purify a corpus of images with a bundle: OUTPUT/data gets one Parquet file per unit of rows.

    A rerun with the same settings skips what is finished. --demo needs nothing and shows all stages.
    """

    # `acsr-ray purify` reads it too.
    sections: ClassVar[tuple[str, ...]] = ("purify_corpus",)

    input: str | None = None
    """Parquet file or WebDataset tar, folder of either, or folder of images; path or URI (file, s3, gs, hf
    and whatever else fsspec opens)."""
    output: str | None = None
    """Folder on a disk that all nodes share, or s3:// URI; the demo's default is ./demo."""
    bundle: str = DEFAULT_BUNDLE
    """What to purify with: a bundle's directory, or the name of a packaged one."""
    reconstruction: Reconstruction | None = None
    """`cbpdn`, the paper's, or `unrolled`, trained on attacks; None: the bundle's default."""
    strength: Strength | None = None
    """How much is taken away, a factor, or `auto`, one for each image; None: the bundle's default."""
    top_k: int = Field(1, ge=1)
    """Reconstruct with so many nearest clusters and average."""
    precision: Precision = "float32"
    """Of the unrolled network; `bfloat16` is faster where the hardware computes in it."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many rows of the corpus."""
    batch_size: int | None = Field(None, ge=1)
    """Most rows per call of encoder and solver; decides memory, never pixels. Default: 64 on CPUs, 1024
    on GPUs."""
    keep_original: bool = False
    """Also write the original image of every purified row, as column acsr_original."""
    delta: bool = False
    """Also keep the output as a Delta Lake table; one that is a table once stays it in later runs."""
    doubt: str | None = None
    """Folder of calibrate_doubt: also write how likely its classifier is wrong, as column acsr_doubt."""
    target: str | None = None
    """The classifier of --doubt, as it was given to calibrate_doubt."""
    demo: bool = False
    """Build a corpus and a bundle from scikit-learn's digits, attack, purify, and write a report."""
    image_column: str = IMAGE
    """Column of Parquet shards with the images: a struct {bytes, path} or plain binary."""
    unit_rows: int = Field(256, ge=1)
    """Most rows per unit, which is what a rerun skips or redoes as a whole."""
    unit_megabytes: float = Field(32.0, gt=0)
    """Decoded MiB aimed at per unit; units of large images have fewer rows."""
    anew: bool = False
    """Purify all of it again where the settings or the bundle are not those of the output, and replace it."""
    on_failure: OnFailure = "low_band"
    """What becomes of an image that the solver fails on: only its low band, or, unsafe, the image itself."""
    wave_units: int = Field(2048, ge=1)
    """Most units between two snapshots; bounds the driver's memory."""
    stage_timeout_s: float = Field(900.0, gt=0)
    """Seconds that a stage may work on one unit before its worker is taken for hung and killed."""
    max_removed_share: float = Field(1.0, ge=0, le=1)
    """Stop, and remove nothing, where more than this share of what was purified is no longer in the input."""
    report: bool = True
    """Write report.html and report.json beside the run's record at its end."""
    min_free_megabytes: int = Field(256, ge=0)
    """Room that must be left on the output's disk; below it the job stops cleanly."""
    device: Device = "auto"
    """Where encoder and solver run; auto takes GPUs when the cluster has some."""
    decode: DecodeLimits = DecodeLimits()
    """Limits on encoded and decoded images."""
    decoder: DecoderSettings = DecoderSettings()
    """Bounds on the process that decodes."""
    ray: RaySettings = RaySettings()
    """Where Ray runs and how much of it to take."""

    @property
    def min_free_bytes(self) -> int:
        """`min_free_megabytes` in bytes."""
        return self.min_free_megabytes * 2**20

    @property
    def plan(self) -> UnitPlan:
        """How to cut the corpus."""
        return UnitPlan(self.image_column, self.unit_rows, self.unit_megabytes)

    @property
    def options(self) -> PurifyOptions:
        """How to purify."""
        return PurifyOptions(
            reconstruction=self.reconstruction,
            strength=self.strength,
            top_k=self.top_k,
            precision=self.precision,
        )


def deciding_settings(settings: PurifyCorpusSettings) -> dict[str, Any]:
    """Return what decides the rows of a unit's output; its digest is the run's fingerprint."""
    return {
        "algorithm_version": ALGORITHM_VERSION,
        "bundle_digest": bundle_digest(settings.bundle),
        # Only what differs from the defaults, so that a new limit leaves older outputs valid.
        "decode": settings.decode.model_dump(mode="json", exclude_defaults=True),
        "image_column": settings.image_column,
        "keep_original": settings.keep_original,
        **({} if settings.on_failure == "low_band" else {"on_failure": settings.on_failure}),
        **load_bundle(settings.bundle).config.changed(settings.options),
        **doubt_settings(settings.doubt, settings.target, settings.bundle, settings.options),
    }


def binding_settings(settings: PurifyCorpusSettings, deciding: dict[str, Any]) -> dict[str, Any]:
    """Return what an output is bound to: what decides its rows, and how its corpus is cut."""
    assert settings.input is not None
    return {
        **deciding,
        "input": absolute_uri(settings.input),
        "limit": settings.limit,
        "unit_rows": settings.unit_rows,
        "unit_megabytes": settings.unit_megabytes,
    }


def output_location(output: str, source: str) -> str:
    """Return the output's absolute location; `CorpusError` where it lies inside the input."""
    path, origin = absolute_uri(output), absolute_uri(source).removesuffix("/")
    if f"{path}/".startswith(f"{origin}/"):
        raise CorpusError(f"--output {path} lies inside --input {origin}")
    return path
