"""How the purifiers of the ablation grid are trained: one setting of the reference changed at a time."""

from collections.abc import Mapping
from pathlib import Path

REFERENCE = "reference"
ABLATIONS: Mapping[str, tuple[str, ...]] = {
    REFERENCE: (),
    "another-seed": ("--seed", "1"),
    "random-init": ("--init", "random"),
    "gaussian-pairs": ("--pairs.kind", "gaussian"),
    "one-surrogate": (),
    "three-surrogates": (),
    "robust-surrogate": (),
    "iterations-1": ("--network.iterations", "1"),
    "iterations-4": ("--network.iterations", "4"),
    "iterations-6": ("--network.iterations", "6"),
    "one-layer": ("--network.deeper",),
    "low-band-passed": ("--network.low-band", "passed"),
    "fixed-thresholds": ("--network.no-noise-adaptive",),
    "cluster-thresholds": ("--network.sharing", "thresholds"),
    "cluster-filters": ("--network.sharing", "filters"),
}
"""Name of an ablation -> flags of `train_purifier` beside those of all."""

SHARDS = {True: 3, False: None}
"""Training shards of an ablation, by whether it is small."""
EPOCHS = {True: 1, False: 20}


def purifier_arguments(
    name: str, surrogates: tuple[Path, Path, Path], robust: Path, bundle: str, small: bool
) -> tuple[list[str], list[Path]]:
    """Return the flags that train one ablation, and the surrogates it needs.

    Args:
        name: of `ABLATIONS`.
        surrogates: the two of the reference, and one more.
        robust: an adversarially trained one.
        bundle: that all start from.
        small: for two cores.
    """
    others = {
        "one-surrogate": surrogates[:1],
        "three-surrogates": surrogates,
        "robust-surrogate": (*surrogates[:2], robust),
    }
    used = others.get(name, surrogates[:2])
    flags = [
        *("--bundle", bundle, "--surrogates", *map(str, used)),
        *("--name", name, "--optimizer.epochs", str(EPOCHS[small])),
        *("--optimizer.peak-lr", "2e-3", "--loss.pixel", "10", "--run.workers", "0"),
        *ABLATIONS[name],
    ]
    return flags, list(used)
