"""Own attacks against torchattacks' on one target: accuracy left, norms and time of each pair, in one run.

Two habits of torchattacks' CW are worked around, so that the same mathematics is compared: it stops on the
loss of the whole batch, so it gets images one by one, and it masks the label's logit with zero, which beats
negative rivals, so it gets positive logits. Its BIM and PGD know linf only.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from acsr_ray.artifacts import atomic_write
from acsr_ray.attacks.run import is_fooled, run_attack
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.subset import Model
from acsr_ray.attacks.torchattacks_adapter import load_torchattacks
from acsr_ray.config import ConfigError, Device, JobSettings, did_you_mean
from acsr_ray.corpus.images import to_unit_range
from acsr_ray.evaluation.grid import EvaluationData
from acsr_ray.evaluation.plan import load_set
from acsr_ray.evaluation.quality import perturbation_norms
from acsr_ray.evaluation.tables import Table, to_csv, to_markdown
from acsr_ray.models.targets import load_target
from acsr_ray.training.loop import resolve_device

POSITIVE = 100.0
"""Added to the logits that torchattacks' CW sees."""
LOOPS = ("cw", "deepfool")
"""Attacks that torchattacks runs, or must be given, image by image."""


class CompareAttacksSettings(JobSettings):
    """Compare our attacks with torchattacks' on one target: accuracy left, norms and time."""

    target: str
    """Target: a `train_target` folder, a TorchScript file or `package.module:factory`."""
    test: tuple[str, ...] = Field(min_length=1)
    """Shards with columns `image` and `label`."""
    output: Path
    """Folder of `parity.md` and `parity.csv`."""
    image_size: int = Field(32, ge=8)
    """Side in pixels of the square images."""
    attacks: tuple[str, ...] = ("fgsm", "bim", "pgd", "pgd_l2", "deepfool", "cw")
    """Pairs to compare."""
    epsilon: float = Field(4 / 255, gt=0)
    """linf radius of fgsm, bim and pgd."""
    l2: float = Field(0.5, gt=0)
    """l2 radius of pgd_l2."""
    images: int = Field(200, ge=1)
    """Images, drawn with the seed."""
    loop_images: int = Field(100, ge=1)
    """Of these, how many torchattacks' loops over single images (cw, deepfool) get."""
    repeats: int = Field(3, ge=1)
    """Timed runs of either side, in turns; the median counts."""
    device: Device = "auto"
    """Where to attack; auto takes a GPU if there is one."""
    seed: int = 0
    """Of the draw of images."""


@dataclass(frozen=True)
class Parity:
    """How one attack of ours compares: accuracies in [0, 1] and mean l2 norms where both fooled the model."""

    name: str
    images: int
    """Images that both sides attacked."""
    own_accuracy: float
    their_accuracy: float
    norm_ratio: float
    """Ours over theirs; NaN where no image was fooled by both."""
    speed: float
    """Time per image of theirs over ours."""


def attack_pairs(epsilon: float, l2: float) -> Mapping[str, tuple[AttackConfig, AttackConfig]]:
    """Return each attack of ours beside torchattacks' with the same steps; only `pgd` starts at random."""
    step, stretch = epsilon / 8, l2 / 5
    linf = {"eps": epsilon, "alpha": step, "steps": 12}
    return {
        "fgsm": (
            AttackConfig(name="fgsm", epsilon=epsilon),
            AttackConfig(name="torchattacks.FGSM", options={"eps": epsilon}),
        ),
        "bim": (
            AttackConfig(name="bim", epsilon=epsilon, steps=12, step_size=step),
            AttackConfig(name="torchattacks.BIM", options=linf),
        ),
        "pgd": (
            AttackConfig(name="pgd", epsilon=epsilon, steps=12, step_size=step),
            AttackConfig(name="torchattacks.PGD", options={**linf, "random_start": True}),
        ),
        "pgd_l2": (
            AttackConfig(name="pgd", norm="l2", epsilon=l2, steps=12, step_size=stretch, random_start=False),
            AttackConfig(
                name="torchattacks.PGDL2",
                options={"eps": l2, "alpha": stretch, "steps": 12, "random_start": False},
            ),
        ),
        "deepfool": (
            AttackConfig(name="deepfool", strengths=()),
            AttackConfig(name="torchattacks.DeepFool", options={"steps": 100, "overshoot": 0.02}),
        ),
        "cw": (
            AttackConfig(name="cw", strengths=()),
            AttackConfig(name="torchattacks.CW", options={"c": 1.0, "kappa": 0.0, "steps": 100, "lr": 0.01}),
        ),
    }


def compare_attacks(settings: CompareAttacksSettings) -> dict[str, Any]:
    """Run the job; writes `parity.md` and `parity.csv` and returns their rows.

    Raises:
        ConfigError: no such pair.
        MissingExtraError: torchattacks is not installed.
    """
    pairs = attack_pairs(settings.epsilon, settings.l2)
    for name in settings.attacks:
        if name not in pairs:
            raise ConfigError(f"no pair of attacks {name!r}{did_you_mean(name, list(pairs))}")
    load_torchattacks()
    device = resolve_device(settings.device)
    data = EvaluationData(
        name="test", test=settings.test, image_size=settings.image_size, images=settings.images
    )
    (chunk,) = load_set(data, "test", settings.seed, settings.images).chunks
    images = torch.from_numpy(to_unit_range(chunk.pixels)).to(device)
    labels = torch.from_numpy(chunk.labels).to(device)
    model = load_target(settings.target, device).model
    found = [
        compare_pair(
            name,
            pairs[name],
            model,
            images,
            labels,
            count=settings.loop_images if name in LOOPS else len(images),
            repeats=settings.repeats,
        )
        for name in settings.attacks
    ]
    table = parity_table(found, settings)
    atomic_write(settings.output / "parity.md", to_markdown(table).encode())
    atomic_write(settings.output / "parity.csv", to_csv(table).encode())
    return {
        "table": str(settings.output / "parity.md"),
        **{row[0]: " | ".join(row[1:]) for row in table.rows},
    }


def compare_pair(
    name: str,
    pair: tuple[AttackConfig, AttackConfig],
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    count: int,
    repeats: int,
) -> Parity:
    """Attack images with both sides, in turns, and compare what they leave as floats.

    Args:
        name: key of `attack_pairs`.
        pair: ours and torchattacks'.
        model: images to logits, in evaluation mode.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64.
        count: how many of the images torchattacks gets, the first ones.
        repeats: timed runs of either side.
    """
    ours, theirs = pair
    count = min(count, len(images))
    own_time, their_time = [], []
    for _ in range(repeats):
        seconds, own = _timed(lambda: run_attack(ours, model, images, labels, seed=0).unrounded)
        own_time.append(seconds / len(images))
        seconds, other = _timed(lambda: _torchattacks(name, theirs, model, images[:count], labels[:count]))
        their_time.append(seconds / count)
    own, images, labels = own[:count], images[:count], labels[:count]
    fooled = [is_fooled(model, x, labels) for x in (own, other)]
    both = fooled[0] & fooled[1]
    lengths = [perturbation_norms(x[both], images[both], "l2").mean().item() for x in (own, other)]
    return Parity(
        name=name,
        images=count,
        own_accuracy=1 - fooled[0].double().mean().item(),
        their_accuracy=1 - fooled[1].double().mean().item(),
        norm_ratio=lengths[0] / lengths[1] if both.any() else float("nan"),
        speed=statistics.median(their_time) / statistics.median(own_time),
    )


def parity_table(found: list[Parity], settings: CompareAttacksSettings) -> Table:
    """Return the comparison as text."""
    rows = tuple(
        (
            parity.name,
            str(parity.images),
            f"{100 * parity.own_accuracy:.1f}",
            f"{100 * parity.their_accuracy:.1f}",
            f"{parity.norm_ratio:.3f}",
            f"{parity.speed:.1f}",
        )
        for parity in found
    )
    caption = (
        f"Target {settings.target}, {settings.images} images, linf {settings.epsilon:.4g}, l2 "
        f"{settings.l2:g}, 12 steps; DeepFool and CW 100 steps; float images. Norm: mean l2 of ours over "
        f"theirs on images that both fooled. Speed: time per image of theirs over ours, median of "
        f"{settings.repeats}."
    )
    header = ("attack", "images", "accuracy left, ours", "accuracy left, torchattacks", "norm", "speed")
    return Table("Our attacks and torchattacks'", caption, header, rows)


def _torchattacks(name: str, config: AttackConfig, model: Model, images: Tensor, labels: Tensor) -> Tensor:
    if name != "cw":
        return run_attack(config, model, images, labels, seed=0).unrounded
    return run_attack(config, lambda x: model(x) + POSITIVE, images, labels, seed=0, batch_size=1).unrounded


def _timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, result
