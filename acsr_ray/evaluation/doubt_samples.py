"""Images as doubt sees them: clean and attacked, purified, and what the classifier made of each.

Attacks are gray-box: they know the classifier and not the purifier. Shapes: V versions of N images, F
features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.run import run_attack
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.corpus.images import to_unit_range
from acsr_ray.evaluation.cells import Chunk
from acsr_ray.purification.doubt import image_features
from acsr_ray.purification.judge import Judge
from acsr_ray.purification.purifier import Purifier
from acsr_ray.sparse.noise import noise_level

TRAFFIC_ATTACKS: Mapping[str, AttackConfig] = {
    "bim-l2-0.01": AttackConfig(name="bim", norm="relative_l2", epsilon=0.01, steps=20),
    "bim-l2-0.04": AttackConfig(name="bim", norm="relative_l2", epsilon=0.04, steps=20),
    "pgd-linf-8": AttackConfig(name="pgd", epsilon=8 / 255),
    "cw": AttackConfig(name="cw"),
    "fgsm-linf-4": AttackConfig(name="fgsm", epsilon=4 / 255),
    "pgd-linf-4": AttackConfig(name="pgd", epsilon=4 / 255),
    "deepfool": AttackConfig(name="deepfool"),
    "square-linf-8": AttackConfig(name="square", epsilon=8 / 255, queries=1000),
}
"""Attacks that traffic may hold, by name."""
CLEAN = "clean"


@dataclass(frozen=True)
class Samples:
    """V rows, each one version of an image: clean or under one attack, purified."""

    kinds: tuple[str, ...]
    """Names of the versions, `clean` first; every image has each of them once."""
    image: NDArray[np.int64]
    """(V,) which image, from 0."""
    kind: NDArray[np.int64]
    """(V,) position in `kinds`."""
    features: NDArray[np.float64]
    """(V, F)."""
    wrong: NDArray[np.bool_]
    """(V,) whether the classifier is wrong on the purified version."""
    wrong_bare: NDArray[np.bool_]
    """(V,) whether it is wrong on the version itself."""

    @property
    def num_images(self) -> int:
        """N."""
        return len(np.unique(self.image))

    @property
    def attacked(self) -> NDArray[np.bool_]:
        """(V,) whether the version is attacked."""
        return self.kind > 0

    def weights(self, prevalence: float) -> NDArray[np.float64]:
        """Return how often each row occurs in traffic, (V,), adding up to 1 over the versions of an image.

        Args:
            prevalence: share of attacked images; each attack is as frequent as any other.
        """
        return np.where(self.attacked, prevalence / (len(self.kinds) - 1), 1 - prevalence)

    def rows(self, chosen: NDArray[np.bool_]) -> "Samples":
        """Return some rows, whole images."""
        return Samples(
            self.kinds,
            self.image[chosen],
            self.kind[chosen],
            self.features[chosen],
            self.wrong[chosen],
            self.wrong_bare[chosen],
        )

    def halves(self, seed: int) -> tuple["Samples", "Samples"]:
        """Return two halves of the images; an image and its attacked versions are on one side."""
        images = np.random.default_rng(seed).permutation(np.unique(self.image))
        first = np.isin(self.image, images[: len(images) // 2])
        return self.rows(first), self.rows(~first)


def observe(
    chunk: Chunk, attack: AttackConfig | None, purifier: Purifier, judge: Judge, seed: int
) -> pa.Table:
    """Attack a chunk of images on the classifier, round to 8 bits, purify, round, and ask the classifier.

    Args:
        chunk: images of one size with labels.
        attack: None leaves them clean.
        purifier: purifies; the attack does not know it.
        judge: the classifier that is attacked and asked.
        seed: of the attack's random numbers.

    Returns:
        Columns `key`, `features` (a list of F), `wrong` and `wrong_bare`.
    """
    device = purifier.device
    images = torch.from_numpy(to_unit_range(chunk.pixels)).to(device)
    labels = torch.from_numpy(chunk.labels).to(device)
    if attack is not None:
        keys = torch.from_numpy(chunk.keys)
        images = run_attack(attack, judge, images, labels, seed=seed, keys=keys).rounded
    with torch.no_grad():
        outcome = purifier.purify(images)
        opinion = judge.compare(images, round_to_pixels(outcome.images))
    features = image_features(
        opinion,
        noise_level(images.cpu()),
        outcome.distance.cpu(),
        outcome.residual.cpu(),
        purifier.gaussians.mean.shape[1],
    )
    return pa.table(
        {
            "key": chunk.keys,
            "features": list(features),
            "wrong": (opinion.label_after != labels).cpu().numpy(),
            "wrong_bare": (opinion.label_before != labels).cpu().numpy(),
        }
    )


def collect_samples(tables: Mapping[str, Sequence[pa.Table]]) -> Samples:
    """Return the rows of the tables of `observe`, by kind; `clean` must be the first."""
    whole = [pa.concat_tables(parts) for parts in tables.values()]
    table = pa.concat_tables(whole)
    return Samples(
        tuple(tables),
        table["key"].to_numpy(),
        np.repeat(np.arange(len(whole)), [len(part) for part in whole]),
        np.array(table["features"].to_pylist(), np.float64),
        table["wrong"].to_numpy(),
        table["wrong_bare"].to_numpy(),
    )
