"""How a training run is spread over workers and kept alive."""

from pydantic import Field

from acsr_ray.config import Settings


class RunSettings(Settings):
    """Workers, checkpoints and retries of one training run."""

    workers: int | None = Field(None, ge=0)
    """Training workers; default: one per GPU, or one. 0: in this process, without Ray and checkpoints."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """Ray CPUs of a worker; default: three quarters of its share, so that reading is not starved."""
    gpus_per_worker: float | None = Field(None, gt=0)
    """Ray GPUs of a worker, a share allowed; default: one."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of a worker; default: its share of the CPUs. It may change the last bits of a loss."""
    name: str | None = None
    """Name of the run. The same name goes on where that run stopped; default: output folder and settings."""
    storage: str | None = None
    """Folder or URI of checkpoints, seen by every worker; default: `.runs` beside the output."""
    checkpoint_seconds: float = Field(600.0, gt=0)
    """Time between checkpoints; one is also written after every epoch."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints, in place of time."""
    keep: int = Field(2, ge=2)
    """Checkpoints kept; a damaged one is passed over, so there are at least two."""
    max_failures: int = Field(3, ge=0)
    """Times that a failed worker group is started again from the last checkpoint."""
