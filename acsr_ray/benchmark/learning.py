"""Online CDL beside sporco's: time until the dictionary codes held-out images as well as the peer's does."""

import time

import torch

from acsr_ray.benchmark.pictures import high_bands
from acsr_ray.benchmark.report import Row
from acsr_ray.config import ConfigError
from acsr_ray.sparse.cbpdn import Cbpdn, CbpdnConfig
from acsr_ray.sparse.cdl import CdlConfig, learn_dictionary

IMAGES = {32: 200, 64: 48, 128: 12}
HELD_OUT = {32: 32, 64: 16, 128: 4}
MOST_EPOCHS = 12
ITERATIONS = 50
"""Of sparse coding inside sporco; METHOD's figure of its speed has as many."""


def benchmark_cdl(side: int, *, shard: str | None, device: str, peer: str, epochs: int, seed: int = 0) -> Row:
    """Return the row of one size.

    Args:
        side: of the images.
        shard: whose images; scikit-learn's photos when omitted.
        device: `cpu` or `cuda`.
        peer: `sporco` or `none`.
        epochs: passes of the peer, or of ours without one.
        seed: of images and atoms.

    Raises:
        ConfigError: ours does not get there in `MOST_EPOCHS` passes.
    """
    count = IMAGES.get(side, max(4, 200 * 32 * 32 // side**2))
    train = high_bands(count, side, seed, shard, "train").to(device)
    held_out = high_bands(HELD_OUT.get(side, 4), side, seed + 1, shard, "held out").to(device)
    own = CdlConfig(epochs=epochs)
    theirs = own.model_copy(
        update={"backend": "sporco", "code": own.code.model_copy(update={"iterations": ITERATIONS})}
    )
    # Neither pays for what happens once: compilation, plans of transforms.
    learn_dictionary(train[:8], own.model_copy(update={"epochs": 1}), seed=seed)
    if peer != "sporco":
        seconds, objective = _learn(train, held_out, own, seed)
        return Row("cdl", f"online, {epochs} passes", side, count, seconds / count, note=f"{objective:.4g}")
    learn_dictionary(train[:8], theirs.model_copy(update={"epochs": 1}), seed=seed)
    their_seconds, their_objective = _learn(train, held_out, theirs, seed)
    for passes in range(1, MOST_EPOCHS + 1):
        seconds, objective = _learn(train, held_out, own.model_copy(update={"epochs": passes}), seed)
        if objective <= their_objective:
            break
    else:
        raise ConfigError(
            f"our CDL ends at {objective:.4g} on held-out images, sporco's at {their_objective:.4g}"
        )
    return Row(
        "cdl",
        f"online, {passes} passes",
        side,
        count,
        seconds / count,
        f"sporco online, {epochs} passes",
        their_seconds / count,
        note=f"held-out objective {objective:.4g}, sporco's {their_objective:.4g}",
    )


def _learn(train: torch.Tensor, held_out: torch.Tensor, config: CdlConfig, seed: int) -> tuple[float, float]:
    started = time.perf_counter()
    atoms = learn_dictionary(train, config, seed=seed).atoms
    seconds = time.perf_counter() - started
    code = CbpdnConfig(lmbda=config.code.lmbda, rounds=30)
    return seconds, Cbpdn(atoms.cpu(), code).code(held_out.cpu()).objective.mean().item()
