"""Stage ii: robust semantic training (RST), the paper's Eq. 7, and what it is compared with (Table 1).

min over theta of E[ max over x' of CE(f(x'), y) + alpha sqrt(d^2 / L + floor) ] + weight decay, where d is
the Mahalanobis distance of R(x') to the cluster that x was given in stage i.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.artifacts import load_tensors
from acsr_ray.attacks.pgd import attack_pixels
from acsr_ray.clustering.assignments import ASSIGNMENTS, GAUSSIANS, Assignments
from acsr_ray.clustering.gaussians import Gaussians, locate_clusters
from acsr_ray.config import Described
from acsr_ray.corpus.labelled import LabelledImages, sample_rows
from acsr_ray.corpus.units import Unit
from acsr_ray.models.classifier import WEIGHTS, EncoderConfig
from acsr_ray.models.wide_resnet import WideResNet, build_wide_resnet
from acsr_ray.training.baseline import clean_metrics
from acsr_ray.training.feed import Batch
from acsr_ray.training.loop import OptimizerConfig, accuracy, predict
from acsr_ray.training.objectives import (
    InnerAttack,
    LatentsAndLogits,
    Objective,
    RobustSemanticTraining,
    Trades,
)

ATTACK_EVALUATION_IMAGES = 1000
Method = Literal["rst", "trades"]


class RobustTraining(Described):
    """See `acsr_ray.training.run.Training`."""

    encoder: EncoderConfig
    """The network."""
    optimizer: OptimizerConfig
    """Schedule and optimiser."""
    seed: int
    """Fixes initialisation, shuffling, augmentation and attacks."""
    method: Method
    """`rst` (adversarial training where alpha is 0) or `trades`."""
    attack: InnerAttack
    """Inner maximisation."""
    alpha: float = Field(ge=0)
    """rst: weight of the latent distance."""
    beta: float = Field(ge=0)
    """trades: weight of the divergence."""
    init: str | None
    """Folder of the starting weights, an artifact of the same network; None: random."""
    init_digest: str | None
    """Of that artifact."""
    semantics: str
    """Folder of the clusters."""
    semantics_digest: str
    """Of that artifact."""

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.encoder.image_size

    def build(self) -> nn.Module:
        """Return the network with its starting weights."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = build_wide_resnet(self.encoder.architecture, self.encoder.num_classes)
        if self.init is not None:
            model.load_state_dict(load_tensors(Path(self.init) / WEIGHTS))
        return model

    def network(self, model: nn.Module) -> nn.Module:
        """Return a network that gives latents beside logits, for RST."""
        assert isinstance(model, WideResNet)
        return model if self.method == "trades" else LatentsAndLogits(model)

    def objective(self, model: nn.Module, network: nn.Module, units: Sequence[Unit]) -> Objective:
        """Return the loss of the method."""
        if self.method == "trades":
            return Trades(model, network, self.attack, self.seed, self.beta)
        device = next(model.parameters()).device
        gaussians = Gaussians.unpack(load_tensors(Path(self.semantics) / GAUSSIANS))
        return RobustSemanticTraining(
            model,
            network,
            self.attack,
            self.seed,
            gaussians=gaussians.to(str(device), torch.float32),
            cluster_of=ClusterOfRows(gaussians, Path(self.semantics), units),
            alpha=self.alpha,
        )

    def closing_metrics(self, model: nn.Module, held_out: LabelledImages, device: str) -> dict[str, float]:
        """Return the accuracies on validation images, clean and under PGD."""
        attacked = attacked_metrics(model, held_out, self.attack, device)
        return {**clean_metrics(model, held_out, device), **attacked}


class ClusterOfRows:
    """The cluster of stage i of every row, as its position among the Gaussians.

    Args:
        gaussians: of stage i.
        semantics: folder of the artifact.
        units: of the training, whose rows must all have been clustered.

    Raises:
        ValueError: a row of a batch that was not clustered.
    """

    def __init__(self, gaussians: Gaussians, semantics: Path, units: Sequence[Unit]) -> None:
        known = Assignments.load(semantics / ASSIGNMENTS)
        index = locate_clusters(gaussians, known.class_id.tolist(), known.cluster_id.tolist()).numpy()
        uris, shard = np.unique(np.asarray(known.shards), return_inverse=True)
        by_shard = np.split(
            np.argsort(shard, kind="stable"), np.cumsum(np.bincount(shard, minlength=len(uris)))[:-1]
        )
        of_uri = dict(zip(uris.tolist(), by_shard, strict=True))
        self._of_unit: list[NDArray[np.int64]] = []
        for unit in units:
            mine = of_uri.get(unit.uri, np.zeros(0, np.int64))
            row = known.rows[mine] - unit.first
            here = (row >= 0) & (row < unit.num_rows)
            clusters = np.full(unit.num_rows, -1)
            clusters[row[here]] = index[mine[here]]
            self._of_unit.append(clusters)

    def __call__(self, batch: Batch) -> Tensor:
        """Return the clusters (n,) int64 of a batch."""
        pairs = zip(batch.units.tolist(), batch.rows.tolist(), strict=True)
        found = torch.tensor([self._of_unit[unit][row] for unit, row in pairs])
        if (found < 0).any():
            raise ValueError(
                f"{int((found < 0).sum())} of {len(found)} images have no cluster: other shards?"
            )
        return found


def attacked_metrics(
    model: nn.Module, held_out: LabelledImages, attack: InnerAttack, device: str
) -> dict[str, float]:
    """Return the white-box accuracy under 10-step PGD, whatever attack was trained on."""
    chosen = sample_rows(len(held_out), ATTACK_EVALUATION_IMAGES)
    pixels, labels = held_out.pixels[chosen], held_out.labels[chosen]
    attacked = attack_pixels(model, pixels, labels, attack.threat, device)
    return {
        "pgd_images": len(labels),
        "pgd_accuracy": accuracy(predict(model, attacked, device), labels),
    }
