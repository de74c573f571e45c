"""Attacks of the torchattacks package under our contract.

torchattacks is the optional extra `attacks`. Its traps, and what is done about them: defaults change between
versions (every argument is passed, `resolve_options` says which); attacks reseed the global generators of
torch, numpy and Python (restored); the model's training flags are only restored at the top and gradients pile
up on its parameters (both protected). Results are clamped to [0, 1]; the caller checks the declared budget.
torchattacks' `AutoAttack` is its own weak variant (10-step components): do not report it by that name.
"""

import contextlib
import importlib
import inspect
import io
import random
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acsr_ray.attacks.spec import TORCHATTACKS, AttackConfig
from acsr_ray.attacks.subset import Model
from acsr_ray.config import ConfigError, MissingExtraError, did_you_mean

NORM_NAMES = {"linf": "Linf", "l2": "L2"}


def load_torchattacks() -> ModuleType:
    """Return the package; `MissingExtraError` with the command to install it when it is absent."""
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        raise MissingExtraError("torchattacks is not installed: pip install 'acsr-ray[attacks]'") from error


def torchattacks_names() -> tuple[str, ...]:
    """Return the names of all attacks of the installed torchattacks."""
    return tuple(_attack_classes())


def resolve_options(config: AttackConfig, strength: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return every argument that the class will be given, for the record: ours over its defaults.

    `eps` and `norm` follow the declared budget where the class has them, the norm is linf or l2, and
    `options` do not set them. `seed` and `n_classes` are filled in per call.

    Raises:
        ConfigError: no such attack, no such option, or a strength that no option is called.
    """
    classes = _attack_classes()
    name = config.name.removeprefix(TORCHATTACKS)
    if name not in classes:
        raise ConfigError(f"torchattacks has no attack {name!r}{did_you_mean(name, list(classes))}")
    parameters = list(inspect.signature(classes[name]).parameters.values())[1:]
    known = {parameter.name: parameter.default for parameter in parameters}
    given = {**config.options, **(strength or {})}
    for option in given:
        if option not in known:
            raise ConfigError(
                f"torchattacks.{name} has no option {option!r}{did_you_mean(option, list(known))}"
            )
    if config.epsilon is not None and config.norm in NORM_NAMES:
        budget = {"eps": config.epsilon, "norm": NORM_NAMES[config.norm]}
        given = {**{option: value for option, value in budget.items() if option in known}, **given}
    return {**known, **given}


def call_torchattacks(
    config: AttackConfig,
    strength: Mapping[str, Any],
    model: Model,
    images: Tensor,
    labels: Tensor,
    seed: int,
) -> Tensor:
    """Run an attack once and return float images in [0, 1], before any check of the budget.

    Args:
        config: names the class and its options.
        strength: options of this rung of the ladder.
        model: images to logits. A model with state per image is only served whole batches: attacks that go on
            with some images, or repeat them, raise `ValueError` from its shape check.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,) int64.
        seed: of the global generators during the call, and of the class's own `seed`.

    Raises:
        ConfigError: no such attack or option, or `n_classes` is not the model's.
    """
    options = resolve_options(config, strength)
    name = config.name.removeprefix(TORCHATTACKS)
    if "n_classes" in options:
        options["n_classes"] = _number_of_classes(config, model, images)
    if "seed" in options and "seed" not in {**config.options, **strength}:
        options["seed"] = seed
    module = model if isinstance(model, nn.Module) else _Module(model)
    with _protected(module, seed, images.device), contextlib.redirect_stdout(io.StringIO()):
        attack = _attack_classes()[name](module, **options)
        # A model without parameters tells no device.
        attack.set_device(images.device)
        # Some of its attacks take views that only contiguous images and gradients allow.
        result: Tensor = attack(images.contiguous(), labels)
    return result.detach().to(images).clamp(0, 1)


class _Module(nn.Module):
    """Any callable as the module that torchattacks asks for."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.call = model
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.call(images)


@contextlib.contextmanager
def _protected(module: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, freeze the parameters, and put everything back at the end."""
    numbers, drawn = np.random.get_state(), random.getstate()
    training = [(part, part.training) for part in module.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            module.requires_grad_(False)
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(drawn)
        for part, flag in training:
            part.training = flag
        for parameter, flag in learning:
            parameter.requires_grad_(flag)


def _number_of_classes(config: AttackConfig, model: Model, images: Tensor) -> int:
    with torch.no_grad():
        # The whole batch, as a model with state per image serves nothing else.
        count = int(model(images).shape[1])
    stated = config.options.get("n_classes", count)
    if stated != count:
        raise ConfigError(f"{config.name}: n_classes is {stated}, but the model has {count} classes")
    if config.name.endswith("APGDT") and count < 4:
        raise ConfigError(f"{config.name} needs at least 4 classes, the model has {count}")
    return count


def _attack_classes() -> dict[str, type]:
    package = load_torchattacks()
    base = importlib.import_module("torchattacks.attack").Attack
    return {
        name: value
        for name, value in vars(package).items()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__.startswith("torchattacks.attacks.")
    }
