"""The stage that purifies and doubts, and the check of its settings before anything runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from acsr_ray.artifacts import artifact_digest
from acsr_ray.columns import DISTANCE, DOUBT, RESIDUAL
from acsr_ray.config import ConfigError
from acsr_ray.purification.bundle import bundle_digest
from acsr_ray.purification.doubt import DoubtModel, image_features, load_doubt
from acsr_ray.purification.judge import Judge, load_judge
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.stages import PurifyImages, batches_by_size
from acsr_ray.sparse.noise import noise_level


class PurifyWithDoubt:
    """Purify, and say how likely a classifier is wrong on each purified image.

    Reads PIXELS, INDEX, DISTANCE.  As `PurifyImages`, and adds DOUBT.  One stage, because doubt needs the
    pixels before and after, and because another pool of actors would take a small machine's last CPU.

    Args:
        purify: arguments of `PurifyImages`.
        doubt: directory of the doubt model.
        target: location of its classifier; None: the bundle's own classes.

    Raises:
        ArtifactError: the doubt model was calibrated for something else.
    """

    def __init__(self, purify: dict[str, Any], doubt: str, target: str | None) -> None:
        self.purify = PurifyImages(**purify)
        self.batch_size = self.purify.batch_size
        self.model, self.judge = load_checked(doubt, target, purify["bundle"], self.purify.purifier)

    @torch.inference_mode()
    def __call__(self, table: pa.Table) -> pa.Table:
        """Purify every decoded row and doubt it; null elsewhere."""
        purified = self.purify(table)
        doubt: list[float | None] = [None] * table.num_rows
        distances = table[DISTANCE].to_pylist()
        residuals = purified[RESIDUAL].to_pylist()
        device = self.purify.purifier.device
        sizes = (batches_by_size(part, self.purify.batch_size) for part in (table, purified))
        for (rows, before), (_, after) in zip(*sizes, strict=True):
            features = image_features(
                self.judge.compare(before.to(device), after.to(device)),
                noise_level(before),
                np.array([distances[row] for row in rows]),
                np.array([residuals[row] for row in rows]),
                self.purify.purifier.gaussians.mean.shape[1],
            )
            for row, value in zip(rows, self.model.doubt(features).tolist(), strict=True):
                doubt[row] = value
        return purified.append_column(DOUBT, pa.array(doubt, pa.float32()))


def load_checked(doubt: str, target: str | None, bundle: str, purifier: Purifier) -> tuple[DoubtModel, Judge]:
    """Load a doubt model and its classifier for a purifier of a bundle.

    Raises:
        ArtifactError: no doubt model, or one that was calibrated for something else.
        TargetError: no target there.
    """
    model = load_doubt(Path(doubt))
    judge = load_judge(purifier, target, model.image_size)
    model.check(
        bundle=bundle_digest(bundle),
        options=purifier.options,
        classifier=judge.digest,
    )
    return model, judge


def doubt_settings(
    doubt: str | None, target: str | None, bundle: str, options: PurifyOptions
) -> dict[str, str]:
    """Return what decides the column of a run, for its fingerprint; {} where no doubt is asked for.

    Raises:
        ConfigError: a target without a doubt model.
        ArtifactError: the doubt model is absent or was calibrated for something else.
        TargetError: no target there.
    """
    if doubt is None:
        if target is not None:
            raise ConfigError("--target is the classifier of --doubt; give both or none")
        return {}
    _, judge = load_checked(doubt, target, bundle, Purifier.load(bundle, options=options))
    return {"doubt_digest": artifact_digest(Path(doubt)), "doubt_classifier": judge.digest}
