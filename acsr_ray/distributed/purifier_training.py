"""The job that trains a bundle's unrolled reconstruction: bundle + shards + surrogates -> bundle."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from acsr_ray.artifacts import MANIFEST, ArtifactError, json_digest
from acsr_ray.config import ConfigError
from acsr_ray.corpus.labelled import numbered_names
from acsr_ray.distributed.latents import TRAINING_DATA
from acsr_ray.distributed.trainer import run_training
from acsr_ray.distributed.training import TrainSettings
from acsr_ray.models.targets import Target, absolute_location, load_target
from acsr_ray.purification.bundle import (
    DEFAULT_BUNDLE,
    bundle_digest,
    find_bundle,
    load_bundle,
    save_bundle,
)
from acsr_ray.purification.options import Strength
from acsr_ray.purification.unrolled import restore_unrolled
from acsr_ray.sparse.unrolled import UnrolledConfig
from acsr_ray.training.loop import AdamConfig
from acsr_ray.training.pairs import PairConfig
from acsr_ray.training.purifier import LossConfig, PurifierTraining, SurrogateConfig
from acsr_ray.training.shards import plan_training

RECONSTRUCTION = "reconstruction"
"""Section of a bundle's manifest that records how its network was trained."""


class TrainPurifierSettings(TrainSettings):
    """Train the unrolled reconstruction of a bundle on attacks of surrogates; write the bundle with it.

    The new bundle purifies with it by default and keeps the old reconstruction beside it. Where strength
    `auto` is 1 is measured on the validation images.
    """

    bundle: str = DEFAULT_BUNDLE
    """Bundle whose dictionaries it starts from: a directory, or the name of a packaged one."""
    surrogates: tuple[str, ...] = Field(min_length=1)
    """Classifiers to attack, of the shards' classes and for images of `image_size`, as for sweep_attacks:
    artifacts, files or module:factory. Not your target, or nothing will tell how well the purifier serves
    attacks on others."""
    output: Path
    """Folder of the new bundle."""
    name: str | None = None
    """Name recorded in the new bundle; default: that of the old one."""
    image_size: int = Field(32, ge=8)
    """Side in pixels of the square training images; the network itself takes images of any size."""
    network: UnrolledConfig = UnrolledConfig()
    """The unrolled network."""
    atoms: int = Field(64, ge=1)
    """Atoms of its first layer; where clusters have filters of their own, of each."""
    init: Literal["dictionary", "random"] | Path = "dictionary"
    """What the network starts from: the bundle's dictionaries, random atoms (the control), or the folder of a
    bundle with a trained network of the same shape."""
    pairs: PairConfig = PairConfig()
    """Attacked images to train on."""
    loss: LossConfig = LossConfig()
    """What to minimise."""
    optimizer: AdamConfig = AdamConfig()
    """Schedule and optimiser."""
    strength: Strength = 1.0
    """Strength of the network in the new bundle unless another is asked for. Networks tend to take too little
    away: try more on validation images of your own."""
    half_precision: bool = True
    """Store the network in half precision, in half the space; the rest stays as it is in the old bundle."""
    seed: int = 0
    """Fixes initialisation, shuffling, augmentation and attacks."""


def train_purifier(settings: TrainPurifierSettings) -> dict[str, Any]:
    """Train the reconstruction, save the bundle with it and return its closing metrics.

    Raises:
        ArtifactError: no such bundle, or its folder is also the output; another network to start from.
        TargetError: a surrogate that cannot be loaded.
        ConfigError: a network that does not fit the bundle, or surrogates that do not fit the shards.
    """
    directory = find_bundle(settings.bundle)
    if directory == settings.output.resolve():
        raise ArtifactError(f"{settings.output} is the bundle to start from; choose another --output")
    class_names = load_bundle(directory).config.class_names
    start = _start(settings)
    targets = [(location, load_target(location)) for location in settings.surrogates]
    surrogates = tuple(
        SurrogateConfig(location=absolute_location(location), digest=target.digest)
        for location, target in targets
    )
    training = PurifierTraining(
        bundle=str(directory),
        bundle_digest=bundle_digest(directory),
        surrogates=surrogates,
        image_size=settings.image_size,
        network_config=settings.network,
        atoms=settings.atoms,
        init=str(settings.init) if start is None else str(start),
        init_digest=None if start is None else bundle_digest(start),
        pairs=settings.pairs,
        loss=settings.loss,
        optimizer=settings.optimizer,
        seed=settings.seed,
    )
    try:
        # What cannot be built should fail before a large corpus is read, as should what the bundle could not
        # load again: a network to start from that is of other clusters.
        restore_unrolled(training.trained(training.build().state_dict()))
    except ValueError as error:
        raise ConfigError(f"the network does not fit bundle {settings.bundle}: {error}") from error
    shards = plan_training(settings.train, settings.optimizer.lanes)
    for location, target in targets:
        check_surrogate(location, target, settings.image_size, shards.class_names, class_names)
    trained = run_training(
        training,
        shards,
        validation=settings.validation,
        output=settings.output,
        device=settings.device,
        run=settings.run,
        settings=settings.ray,
    )
    bundle = training.trained(trained.weights, trained.metrics, settings.strength)
    if settings.half_precision:
        stored = {name: tensor.half() for name, tensor in bundle.reconstruction.items()}
        bundle = replace(bundle, reconstruction=stored)
    if settings.name is not None:
        bundle = bundle.renamed(settings.name)
    metrics = {"train_images": shards.num_rows, **trained.metrics}
    content = {
        **_provenance(directory),
        RECONSTRUCTION: {
            TRAINING_DATA: json_digest(sorted({unit.content for unit in shards.units})),
            "bundle_digest": training.bundle_digest,
            "init_digest": training.init_digest,
            "surrogates": [entry.digest for entry in surrogates],
            # A digest, because a bundle travels and paths of the machine that made it do not.
            "settings_digest": json_digest(settings.deciding()),
            "metrics": metrics,
        },
    }
    save_bundle(settings.output, bundle, content)
    return {**metrics, "output": str(settings.output)}


def _start(settings: TrainPurifierSettings) -> Path | None:
    """Return the folder of the bundle whose network is the start; None where there is none."""
    if isinstance(settings.init, str):
        return None
    bundle = load_bundle(settings.init)
    found = bundle.config.unrolled
    if found != settings.network:
        raise ArtifactError(f"{settings.init} has the network {found}, not the one that is to be trained")
    atoms = restore_unrolled(bundle).atoms
    if atoms != settings.atoms:
        raise ArtifactError(f"the network of {settings.init} has {atoms} atoms, --atoms is {settings.atoms}")
    return find_bundle(settings.init)


def check_surrogate(
    location: str,
    target: Target,
    image_size: int,
    shard_names: tuple[str, ...],
    bundle_names: tuple[str, ...],
) -> None:
    """Raise `ConfigError` for a surrogate that was made for other images or classes than it would be shown.

    Args:
        location: what the user calls it.
        target: the surrogate.
        image_size: side in pixels of the training images.
        shard_names: classes of the training shards, perhaps only numbered.
        bundle_names: classes of the bundle, which may be of another corpus; they are only asked where the
            shards have no names, and where there are as many of them.
    """
    if target.image_size not in (None, image_size):
        raise ConfigError(
            f"surrogate {location} takes images of {target.image_size} pixels a side, --image-size is "
            f"{image_size}"
        )
    names = shard_names
    if names == numbered_names(len(names)):
        names = bundle_names if len(bundle_names) == len(names) else ()
    count = _count_classes(location, target, image_size)
    # Labels of no name may be only some of the classes.
    if count < len(shard_names) or (names and count != len(names)):
        raise ConfigError(f"surrogate {location} has {count} classes, the shards have {len(shard_names)}")
    # Classes that are only numbered go with any names.
    own, numbers = target.class_names or names, numbered_names(count)
    if names and own != names and numbers not in (own, names):
        raise ConfigError(
            f"surrogate {location} has classes {', '.join(own)}; those of the images are {', '.join(names)}"
        )


def _count_classes(location: str, target: Target, image_size: int) -> int:
    """Return the length of the logits, which not every source of a target tells."""
    try:
        with torch.no_grad():
            return int(target.model(torch.zeros(1, 3, image_size, image_size)).shape[1])
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"surrogate {location} takes no images of {image_size} pixels a side: {error}"
        ) from error


def _provenance(directory: Path) -> dict[str, Any]:
    """Return what a bundle's manifest says beside what is written anew."""
    manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
    written = ("schema_version", "kind", "package_version", "algorithm_version", "bundle", "files")
    return {name: value for name, value in manifest.items() if name not in written}
