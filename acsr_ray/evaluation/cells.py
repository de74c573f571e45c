"""What one unit of a sweep does: attack a chunk of images, or defend and classify one. Plain torch, no Ray.

A unit is a pure function of its inputs, which its fingerprint names; it gives an Arrow table of one row per
image. Attacked images are stored as 8-bit PNG, so what defences see is what a corpus would hold.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from acsr_ray.artifacts import json_digest
from acsr_ray.attacks.calibration import Calibrated, calibrate
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.threat import Norm
from acsr_ray.corpus.images import DecodeLimits, Pixels, decode_image, encode_png, to_pixels, to_unit_range
from acsr_ray.defenses.base import Defense
from acsr_ray.evaluation.attackers import craft
from acsr_ray.evaluation.defenses import DefenseConfig, build_defense
from acsr_ray.evaluation.grid import SweepAttack, SweepTarget
from acsr_ray.evaluation.quality import perturbation_norms, psnr, ssim
from acsr_ray.models.targets import Target, load_target

SWEEP_VERSION = 1
"""Raised when the same unit would give other rows."""
DEFENCE_BATCH = 50


@dataclass(frozen=True)
class Chunk:
    """Some images of an evaluation set: pixels (N, S, S, 3) uint8, labels (N,) int64, keys (N,) positions."""

    pixels: Pixels
    labels: NDArray[np.int64]
    keys: NDArray[np.int64]

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def head(self, count: int) -> "Chunk":
        """Return the first rows."""
        return Chunk(self.pixels[:count], self.labels[:count], self.keys[:count])


@lru_cache(maxsize=8)
def _target(description: str, device: str) -> Target:
    entry = SweepTarget.model_validate_json(description)
    return load_target(entry.location, device, entry.config)


def target_of(entry: SweepTarget, device: str) -> Target:
    """Load a target, once per process."""
    return _target(entry.model_dump_json(), device)


@lru_cache(maxsize=8)
def _defense(description: str, device: str) -> Defense:
    return build_defense(DefenseConfig.model_validate_json(description), device)


def defense_of(config: DefenseConfig, device: str) -> Defense:
    """Build a defence, once per process."""
    return _defense(config.model_dump_json(), device)


def attack_unit(
    chunk: Chunk,
    entry: SweepAttack,
    crafted_on: SweepTarget,
    defense: DefenseConfig | None,
    *,
    seed: int,
    device: str,
) -> pa.Table:
    """Attack one chunk.

    Args:
        chunk: clean images.
        entry: attack and the attacker's knowledge; its budget already calibrated.
        crafted_on: target that the gradients or queries see.
        defense: for adaptive attacks, the defence they see too.
        seed: of the attack's random numbers.
        device: where to compute.

    Returns:
        Columns `key`, `image` (PNG bytes), `float_prediction` (what the attacked model says before rounding),
        `linf`, `l2`, `relative_l2` of the rounded perturbation, `attack_seconds` per image, `scaled_back`
        (whether the float result lay outside the budget).
    """
    classify = target_of(crafted_on, device).model
    images = torch.from_numpy(to_unit_range(chunk.pixels)).to(device)
    labels = torch.from_numpy(chunk.labels).to(device)
    keys = torch.from_numpy(chunk.keys).to(device)
    built = None if defense is None else defense_of(defense, device)
    started = _clock(device)
    attacked, seen = craft(entry, classify, built, images, labels, keys, seed)
    seconds = (_clock(device) - started) / max(1, len(chunk))
    with torch.no_grad():
        floats = torch.cat([seen(part).argmax(1) for part in attacked.unrounded.split(DEFENCE_BATCH)])
    rounded, images = attacked.rounded.cpu(), images.cpu()
    lengths = {norm: perturbation_norms(rounded, images, norm).numpy() for norm in get_args(Norm)}
    return pa.table(
        {
            "key": chunk.keys,
            "image": [encode_png(pixels) for pixels in to_pixels(rounded.numpy())],
            "float_prediction": floats.cpu().numpy().astype(np.int32),
            **lengths,
            "attack_seconds": np.full(len(chunk), seconds, np.float32),
            "scaled_back": attacked.scaled_back.cpu().numpy(),
        }
    )


def defend_unit(
    chunk: Chunk,
    attacked: pa.Table | None,
    target: SweepTarget,
    defense: DefenseConfig,
    *,
    device: str,
) -> pa.Table:
    """Defend and classify one chunk.

    Args:
        chunk: clean images.
        attacked: the chunk's adversarial images from `attack_unit`; None for the clean images.
        target: classifier.
        defense: defence.
        device: where to compute.

    Returns:
        Columns `key`, `label`, `prediction`, `confidence`, `probabilities`, `psnr` and `ssim` of the defended
        image against the clean one, `seconds` per image of defence and classifier.
    """
    clean = torch.from_numpy(to_unit_range(chunk.pixels))
    images = clean if attacked is None else torch.from_numpy(to_unit_range(stored_pixels(attacked)))
    classify = target_of(target, device).model
    built = defense_of(defense, device)
    probabilities, defended, seconds = [], [], 0.0
    for part in images.to(device).split(DEFENCE_BATCH):
        seen: list[Tensor] = []

        def stored(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            # The classifier reads what is stored, which has 8 bits.
            seen.append(round_to_pixels(x))
            return classify(seen[-1])

        started = _clock(device)
        with torch.no_grad():
            logits = built.logits(stored, part)
        seconds += _clock(device) - started
        probabilities.append(logits.softmax(1).cpu())
        # An ensemble shows the classifier many images, none of which is the defended one.
        single = len(seen) == 1 and seen[0].shape == part.shape
        defended.append((seen[0] if single else torch.full_like(part, torch.nan)).cpu())
    shares = torch.cat(probabilities)
    shown = torch.cat(defended)
    return pa.table(
        {
            "key": chunk.keys,
            "label": chunk.labels.astype(np.int32),
            "prediction": shares.argmax(1).numpy().astype(np.int32),
            "confidence": shares.amax(1).numpy(),
            "probabilities": list(shares.numpy()),
            "psnr": np.asarray(psnr(shown, clean), np.float32),
            "ssim": np.asarray(ssim(shown, clean), np.float32),
            "seconds": np.full(len(chunk), seconds / max(1, len(chunk)), np.float32),
        }
    )


def calibrate_unit(
    chunk: Chunk, attack: AttackConfig, ratio: float, target: SweepTarget, *, seed: int, device: str
) -> tuple[Calibrated, float]:
    """Choose the budget at which the bare target keeps a share of its clean accuracy (METHOD, B0).

    Returns:
        The calibrated attack and the accuracy that was wanted.
    """
    classify = target_of(target, device).model
    images = torch.from_numpy(to_unit_range(chunk.pixels)).to(device)
    labels = torch.from_numpy(chunk.labels).to(device)
    with torch.no_grad():
        parts = [classify(part) for part in images.split(DEFENCE_BATCH)]
        clean = (torch.cat(parts).argmax(1) == labels).float().mean().item()
    return calibrate(attack, classify, images, labels, ratio * clean, seed=seed), ratio * clean


def _clock(device: str) -> float:
    """Return the time in seconds when all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def stored_pixels(attacked: pa.Table) -> Pixels:
    """Return the pixels (N, S, S, 3) uint8 of a table of `attack_unit`."""
    return np.stack([decode_image(data, DecodeLimits()) for data in attacked["image"].to_pylist()])


def fingerprint(parts: Sequence[object]) -> str:
    """Return the name of a unit: a digest of everything that decides its rows."""
    return json_digest([SWEEP_VERSION, *parts])[:20]
