"""Target classifiers for attack evaluation: plain or adversarially trained, from scratch or from weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acsr_ray.artifacts import artifact_kind, file_digest, load_artifact, load_tensors
from acsr_ray.config import Described
from acsr_ray.corpus.labelled import LabelledImages
from acsr_ray.corpus.units import Unit
from acsr_ray.models.targets import (
    WEIGHTS,
    Normalized,
    TargetConfig,
    TargetError,
    build_target,
    initialize_weights,
)
from acsr_ray.training.baseline import clean_metrics
from acsr_ray.training.loop import OptimizerConfig
from acsr_ray.training.objectives import AdversarialTraining, CrossEntropy, InnerAttack, Objective
from acsr_ray.training.robust import attacked_metrics


class TargetTraining(Described):
    """See `acsr_ray.training.run.Training`."""

    target: TargetConfig
    """The network."""
    optimizer: OptimizerConfig
    """Schedule and optimiser."""
    seed: int
    """Fixes initialisation, shuffling, augmentation and attacks."""
    attack: InnerAttack | None
    """Inner maximisation of adversarial training; None: plain training."""
    init: str | None
    """Weights to start from, a folder or a safetensors file; None: random."""
    init_digest: str | None
    """Of that file."""

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.target.image_size

    def build(self) -> nn.Module:
        """Return the network with its starting weights."""
        return self.initialized()[0]

    def initialized(self) -> tuple[nn.Module, list[str]]:
        """Return the network and the layers that kept random weights though there were others to take.

        Raises:
            TargetError: weights that do not fit, or are behind another normalisation.
            ArtifactError: weights that cannot be read or were changed.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = build_target(self.target)
        if self.init is None:
            return model, []
        return model, _initialize(model, self.target, Path(self.init))

    def network(self, model: nn.Module) -> nn.Module:
        """Return the model."""
        return model

    def objective(self, model: nn.Module, network: nn.Module, units: Sequence[Unit]) -> Objective:
        """Return the cross-entropy, of attacked images where there is an attack."""
        if self.attack is None:
            return CrossEntropy(network)
        return AdversarialTraining(model, network, self.attack, self.seed)

    def closing_metrics(self, model: nn.Module, held_out: LabelledImages, device: str) -> dict[str, float]:
        """Return the accuracies on validation images."""
        metrics = clean_metrics(model, held_out, device)
        if self.attack is not None:
            metrics |= attacked_metrics(model, held_out, self.attack, device)
        return metrics


def weights_digest(location: Path) -> str:
    """Return the digest of the weights in a folder or a file; `ArtifactError` when they cannot be used."""
    if location.is_dir():
        load_artifact(location, artifact_kind(location) or "target")
    else:
        load_tensors(location)
    return file_digest(_weights_file(location))


def _weights_file(location: Path) -> Path:
    return location / WEIGHTS if location.is_dir() else location


def _initialize(model: nn.Module, config: TargetConfig, location: Path) -> list[str]:
    if location.is_dir():
        manifest = load_artifact(location, artifact_kind(location) or "target")
        _check_normalization(config, manifest.get("target", {}), location)
    tensors = load_tensors(_weights_file(location))
    # Files of others hold the bare network; ours has its normalisation in front.
    if isinstance(model, Normalized) and not any(name.startswith("network.") for name in tensors):
        tensors = {f"network.{name}": tensor for name, tensor in tensors.items()}
    return initialize_weights(model, tensors)


def _check_normalization(config: TargetConfig, described: Mapping[str, Any], origin: Path) -> None:
    # Weights behind another normalisation would start from shifted features, and nothing would show it.
    for name in ("mean", "std"):
        theirs = tuple(described.get(name, getattr(config, name)))
        if theirs != getattr(config, name):
            values = " ".join(map(str, theirs))
            raise TargetError(f"weights of {origin} were trained with --{name} {values}; give the same")
