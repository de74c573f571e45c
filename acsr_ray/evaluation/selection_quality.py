"""How well clusters are selected: the right class, and the same cluster before and after an attack.

Shapes: N held-out images, K clusters, L latent length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acsr_ray.attacks.pgd import attack_pixels
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.clustering.gaussians import Gaussians
from acsr_ray.clustering.selection import SelectionRule, select_cluster
from acsr_ray.corpus.images import to_unit_range
from acsr_ray.corpus.labelled import read_labelled, sample_rows
from acsr_ray.evaluation.intervals import wilson_share
from acsr_ray.models.classifier import Classifier, encode, load_classifier

ROWS_AT_ONCE = 250


@dataclass(frozen=True)
class HeldOutLatents:
    """One encoder's latents (N, L) float64 of images, and of the same images attacked on that encoder."""

    clean: Tensor
    attacked: Tensor
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class SelectionOutcome:
    """What became of each image, (N,) bool."""

    own_clean: NDArray[np.bool_]
    """Its cluster is one of its class."""
    own_attacked: NDArray[np.bool_]
    """The same for the attacked image."""
    same: NDArray[np.bool_]
    """The attacked image gets the cluster of the clean one."""

    @property
    def score(self) -> float:
        """The measure that rules are chosen by: mean of both shares of the own class."""
        return float(self.own_clean.mean() + self.own_attacked.mean()) / 2

    def cells(self) -> tuple[str, str, str]:
        """Return the three shares in percent with Wilson 95 % intervals."""
        own_clean, own_attacked, same = (
            str(wilson_share(int(hits.sum()), len(hits)))
            for hits in (self.own_clean, self.own_attacked, self.same)
        )
        return own_clean, own_attacked, same


def held_out_latents(
    classifier: Path,
    kind: str,
    locations: Sequence[str],
    count: int,
    threat: ThreatModel,
    device: str,
    half: bool = False,
) -> HeldOutLatents:
    """Encode held-out images and the same images attacked on the encoder itself, white-box, by 10-step PGD.

    Args:
        classifier: artifact of the encoder.
        kind: of that artifact.
        locations: labelled shards.
        count: most images, drawn at random: shards are often sorted by class.
        threat: the set that attacked images stay in; they are rounded to 8 bits.
        device: where to compute.
        half: round the weights to half precision first.
    """
    loaded = load_classifier(classifier, kind, device)
    if half:
        loaded.model.half().float()
    data = read_labelled(locations, loaded.config.image_size)
    chosen = sample_rows(len(data), count)
    pixels, labels = data.pixels[chosen], data.labels[chosen]
    attacked = attack_pixels(loaded.model, pixels, labels, threat, device)
    return HeldOutLatents(_latents(loaded, pixels, device), _latents(loaded, attacked, device), labels)


def selection_outcome(
    held_out: HeldOutLatents, gaussians: Gaussians, rule: SelectionRule
) -> SelectionOutcome:
    """Select a cluster for every image, clean and attacked.

    Args:
        held_out: latents of one encoder.
        gaussians: float64, fitted with `tied=True` for the rule `tied`.
        rule: how clusters are compared.
    """
    clean, attacked = (_selected(part, gaussians, rule) for part in (held_out.clean, held_out.attacked))
    class_of = gaussians.class_id.numpy()
    return SelectionOutcome(
        class_of[clean] == held_out.labels, class_of[attacked] == held_out.labels, clean == attacked
    )


def _selected(latents: Tensor, gaussians: Gaussians, rule: SelectionRule) -> NDArray[np.int64]:
    parts = [select_cluster(part, gaussians, rule).index for part in latents.split(ROWS_AT_ONCE)]
    return torch.cat(parts).numpy()


def _latents(loaded: Classifier, pixels: NDArray[np.uint8], device: str) -> Tensor:
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), ROWS_AT_ONCE):
            images = torch.from_numpy(to_unit_range(pixels[start : start + ROWS_AT_ONCE])).to(device)
            parts.append(encode(loaded.model, images, loaded.config.image_size).double().cpu())
    return torch.cat(parts)
