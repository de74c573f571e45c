"""Attacks of the torchattacks package under our contract: explicit arguments, [0, 1] images, 8-bit results.

torchattacks is the optional extra `attacks`. Its defaults change between versions, so every argument is
passed; it reseeds the global generator, so that is restored.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from acsr_ray.config import AcsrError


class MissingExtraError(AcsrError, RuntimeError):
    """An optional dependency is not installed; the message says how to get it."""


@dataclass(frozen=True)
class AttackSpec:
    """One attack at rising strengths.

    A stored image has 8-bit pixels. Where rounding undoes a minimal-norm attack, the next strength is tried
    on that image, so `strengths` are the arguments that change and `options` those that do not.
    """

    name: str
    options: Mapping[str, Any]
    strengths: Sequence[Mapping[str, Any]] = ({},)


@dataclass(frozen=True)
class Attacked:
    """Attacked images (N, 3, H, W): on the 8-bit grid, and as floats from the first strength."""

    rounded: Tensor
    unrounded: Tensor


def run_attack(
    spec: AttackSpec, model: nn.Module, images: Tensor, labels: Tensor, *, seed: int = 0
) -> Attacked:
    """Attack a bare classifier.

    Args:
        spec: class of torchattacks and its arguments.
        model: images in [0, 1] to logits, in evaluation mode.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64 true labels.
        seed: for attacks that draw random numbers.

    Raises:
        MissingExtraError: torchattacks is not installed.
        ValueError: it has no attack of this name.
    """
    unrounded = _call(spec, spec.strengths[0], model, images, labels, seed)
    rounded = round_to_pixels(unrounded)
    for strength in spec.strengths[1:]:
        with torch.no_grad():
            standing = (model(rounded).argmax(1) == labels).nonzero()[:, 0]
        if not len(standing):
            break
        again = _call(spec, strength, model, images[standing], labels[standing], seed)
        rounded[standing] = round_to_pixels(again)
    return Attacked(rounded, unrounded)


def round_to_pixels(images: Tensor) -> Tensor:
    """Return the nearest images that 8 bits can store, still as floats in [0, 1]."""
    return (images * 255).round().clamp(0, 255) / 255


def load_torchattacks() -> ModuleType:
    """Return the package; `MissingExtraError` with the command to install it when it is absent."""
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        raise MissingExtraError("torchattacks is not installed: pip install 'acsr-ray[attacks]'") from error


def _call(
    spec: AttackSpec,
    strength: Mapping[str, Any],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    seed: int,
) -> Tensor:
    torchattacks = load_torchattacks()
    if not hasattr(torchattacks, spec.name):
        raise ValueError(f"torchattacks has no attack {spec.name!r}")
    build: Callable[..., Any] = getattr(torchattacks, spec.name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result: Tensor = build(model, **spec.options, **strength)(images, labels)
    return result.detach().clamp(0, 1)
