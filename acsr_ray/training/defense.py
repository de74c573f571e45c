"""The job behind defences that need something learnt from clean images: one artifact per kind."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from acsr_ray.config import ConfigError, Device, JobSettings
from acsr_ray.corpus.images import Pixels
from acsr_ray.corpus.labelled import read_labelled
from acsr_ray.defenses.quilting import PatchBankConfig, collect_patches, save_patch_bank
from acsr_ray.models.autoencoder import save_autoencoder
from acsr_ray.models.pixel_cnn import save_pixel_cnn
from acsr_ray.training.global_dictionary import (
    GlobalDictionaryConfig,
    learn_global_dictionary,
    save_global_dictionary,
)
from acsr_ray.training.loop import resolve_device
from acsr_ray.training.reformers import (
    MagnetTraining,
    PixelCnnTraining,
    train_autoencoder,
    train_pixel_cnn,
)

DefenseKind = Literal["magnet", "pixel_cnn", "global_dictionary", "patch_bank"]
Trained = tuple[dict[str, Any], Callable[[dict[str, Any]], None]]
"""Closing figures, and what writes the artifact given the rest of its manifest."""


class TrainDefenseSettings(JobSettings):
    """Train what a rival defence needs, from labelled Parquet shards of clean images, as an artifact."""

    kind: DefenseKind
    """What to make: for the defences magnet, pixel_defend, stl and quilting, in this order."""
    train: tuple[str, ...] = Field(min_length=1)
    """Training shards: Parquet files or folders with columns `image` and `label`."""
    output: Path
    """Folder of the artifact."""
    image_size: int = Field(32, ge=8)
    """Side in pixels of the square that images are resized to."""
    magnet: MagnetTraining = MagnetTraining()
    """Training of the autoencoder, for the kind magnet."""
    pixel_cnn: PixelCnnTraining = PixelCnnTraining()
    """Training of the PixelCNN, for the kind pixel_cnn."""
    global_dictionary: GlobalDictionaryConfig = GlobalDictionaryConfig()
    """Learning of the dictionary, for the kind global_dictionary."""
    patch_bank: PatchBankConfig = PatchBankConfig()
    """Collection of patches, for the kind patch_bank."""
    device: Device = "auto"
    """Where to train; auto takes a GPU if there is one."""
    seed: int = 0
    """Fixes initialisation and everything drawn."""


def train_defense(settings: TrainDefenseSettings) -> dict[str, Any]:
    """Train one kind, save it as an artifact of that kind and return its closing figures.

    Raises:
        ConfigError: images smaller than an atom or a patch.
    """
    data = read_labelled(settings.train, settings.image_size)
    metrics = {"train_images": len(data), "unreadable_images": data.num_unreadable}
    others = set(get_args(DefenseKind)) - {settings.kind}
    described = settings.model_dump(mode="json", exclude={"config", "output", *others})
    try:
        figures, save = TRAINERS[settings.kind](settings, data.pixels, resolve_device(settings.device))
    except ValueError as error:
        raise ConfigError(f"{settings.kind}: {error}") from error
    save({"settings": described, "metrics": {**metrics, **figures}})
    return {**metrics, **figures}


def _train_magnet(settings: TrainDefenseSettings, pixels: Pixels, device: str) -> Trained:
    model, figures = train_autoencoder(pixels, settings.magnet, device=device, seed=settings.seed)
    return figures, partial(save_autoencoder, settings.output, model, settings.magnet.network)


def _train_pixel_cnn(settings: TrainDefenseSettings, pixels: Pixels, device: str) -> Trained:
    model, figures = train_pixel_cnn(pixels, settings.pixel_cnn, device=device, seed=settings.seed)
    return figures, partial(save_pixel_cnn, settings.output, model)


def _learn_dictionary(settings: TrainDefenseSettings, pixels: Pixels, device: str) -> Trained:
    dictionary, figures = learn_global_dictionary(
        pixels, settings.global_dictionary, device=device, seed=settings.seed
    )
    return figures, partial(save_global_dictionary, settings.output, dictionary)


def _collect_patches(settings: TrainDefenseSettings, pixels: Pixels, device: str) -> Trained:
    patches = collect_patches(pixels, settings.patch_bank, settings.seed)
    return {"patches": len(patches)}, partial(save_patch_bank, settings.output, patches)


TRAINERS: Mapping[DefenseKind, Callable[[TrainDefenseSettings, Pixels, str], Trained]] = {
    "magnet": _train_magnet,
    "pixel_cnn": _train_pixel_cnn,
    "global_dictionary": _learn_dictionary,
    "patch_bank": _collect_patches,
}
