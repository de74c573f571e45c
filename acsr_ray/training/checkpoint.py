"""Checkpoints of a training run: an artifact whose every byte is checked before anything goes on from it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from acsr_ray.artifacts import ArtifactError, load_artifact, load_tensors, save_tensor_artifact
from acsr_ray.training.loop import Stepper

KIND = "checkpoint"
STATE = "state.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next step to make, and how it got there.

    `epoch` and `step` are the next global step; `taken` counts steps since the start; `losses` holds the mean
    loss of each finished epoch.
    """

    epoch: int = 0
    step: int = 0
    taken: int = 0
    losses: tuple[float, ...] = ()
    loss_sum: float = 0.0
    """Of the steps of the unfinished epoch."""
    unreadable: int = 0
    """Rows of the first epoch that could not be decoded."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint tells without its tensors."""

    position: Position
    metrics: dict[str, Any] | None
    """Closing metrics; None until the run is over."""


def save_checkpoint(
    directory: Path,
    stepper: Stepper,
    position: Position,
    identity: str,
    metrics: dict[str, Any] | None = None,
) -> None:
    """Write the state of a run.

    Args:
        directory: folder to write.
        stepper: model, optimiser and averaged weights.
        position: where the run stands.
        identity: digest of what decides the run; another run refuses the checkpoint.
        metrics: closing metrics, when the run is over.
    """
    content = {"identity": identity, "position": asdict(position), "metrics": metrics}
    save_tensor_artifact(directory, KIND, STATE, stepper.tensors(), content)


def read_checkpoint(directory: Path, identity: str) -> Checkpoint:
    """Check a checkpoint, every byte of it, and return where the run stood.

    Raises:
        ArtifactError: it is incomplete, was changed, or belongs to a run with other settings or data.
    """
    manifest: dict[str, Any] = load_artifact(directory, KIND)
    if manifest.get("identity") != identity:
        raise ArtifactError(f"{directory} belongs to a run with other settings or data")
    fields = manifest["position"]
    position = Position(**{**fields, "losses": tuple(fields["losses"])})
    return Checkpoint(position, manifest.get("metrics"))


def restore_checkpoint(directory: Path, stepper: Stepper, position: Position) -> None:
    """Load what `read_checkpoint` checked."""
    stepper.restore(load_tensors(directory / STATE), position.taken)


def final_weights(directory: Path) -> dict[str, Tensor]:
    """Return the weights that a finished run saves: the averaged ones where there are some."""
    tensors = load_tensors(directory / STATE)
    kind = "averaged." if any(name.startswith("averaged.") for name in tensors) else "model."
    return {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
