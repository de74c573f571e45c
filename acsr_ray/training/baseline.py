"""Stage i, step 1: the baseline `f_bsl`, a WideResNet trained with cross-entropy on clean images (Eq. 1)."""

from collections.abc import Sequence

import torch
from torch import nn

from acsr_ray.config import Described
from acsr_ray.corpus.labelled import LabelledImages
from acsr_ray.corpus.units import Unit
from acsr_ray.models.classifier import EncoderConfig
from acsr_ray.models.wide_resnet import build_wide_resnet
from acsr_ray.training.loop import OptimizerConfig, accuracy, predict
from acsr_ray.training.objectives import CrossEntropy, Objective


class BaselineTraining(Described):
    """See `acsr_ray.training.run.Training`."""

    encoder: EncoderConfig
    """The network."""
    optimizer: OptimizerConfig
    """Schedule and optimiser."""
    seed: int
    """Fixes initialisation, shuffling and augmentation."""

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.encoder.image_size

    def build(self) -> nn.Module:
        """Return the network with random weights."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return build_wide_resnet(self.encoder.architecture, self.encoder.num_classes)

    def network(self, model: nn.Module) -> nn.Module:
        """Return the model."""
        return model

    def objective(self, model: nn.Module, network: nn.Module, units: Sequence[Unit]) -> Objective:
        """Return the cross-entropy on clean images."""
        return CrossEntropy(network)

    def closing_metrics(self, model: nn.Module, held_out: LabelledImages, device: str) -> dict[str, float]:
        """Return the accuracy on validation images."""
        return clean_metrics(model, held_out, device)


def clean_metrics(model: nn.Module, held_out: LabelledImages, device: str) -> dict[str, float]:
    """Return the accuracy on validation images."""
    logits = predict(model, held_out.pixels, device)
    return {
        "validation_images": len(held_out),
        "validation_accuracy": accuracy(logits, held_out.labels),
    }
