"""One dictionary for images of all classes, as STL uses, saved as artifact `global_dictionary`.

Source: Sun et al. 2019, Adversarial Defense by Stratified Convolutional Sparse Coding, whose Sparse
Transformation Layer has neither clusters nor an encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from acsr_ray.artifacts import (
    ArtifactError,
    load_artifact,
    load_tensors,
    save_tensor_artifact,
)
from acsr_ray.config import Described
from acsr_ray.corpus.images import Pixels, to_unit_range
from acsr_ray.corpus.rows import crop_alike
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.cdl import CdlConfig, learn_dictionary
from acsr_ray.sparse.tikhonov import TikhonovConfig, tikhonov_split

ATOMS = "dictionary.safetensors"
KIND = "global_dictionary"


class GlobalDictionaryConfig(Described):
    """How the dictionary is learnt; as a cluster's, but from images of all classes."""

    images: int = Field(1000, ge=1)
    """Images drawn with the seed."""
    crop: int = Field(64, ge=8)
    """Side of the square cut from each image; smaller images are used whole."""
    cdl: CdlConfig = CdlConfig()
    """Dictionary learning; its sparse coding is also the purification's."""
    tikhonov: TikhonovConfig = TikhonovConfig()
    """Split whose high band is learnt."""


@dataclass(frozen=True)
class GlobalDictionary:
    """Atoms (M, 3, h, w) with the settings of the sparse coding and split that they are for."""

    atoms: Tensor
    cbpdn: CbpdnConfig
    tikhonov: TikhonovConfig


def learn_global_dictionary(
    pixels: Pixels, config: GlobalDictionaryConfig, *, device: str, seed: int
) -> tuple[GlobalDictionary, dict[str, Any]]:
    """Learn one dictionary from images (N, S, S, 3) uint8.

    Returns:
        The dictionary and its mean objective over the first and last quarter of the mini-batches.
    """
    generator = np.random.default_rng(seed)
    count = min(config.images, len(pixels))
    chosen = np.sort(generator.choice(len(pixels), count, replace=False))
    crops = crop_alike(list(pixels[chosen]), config.crop, config.cdl.window, seed)
    _, highpass = tikhonov_split(torch.from_numpy(to_unit_range(crops)).to(device), config.tikhonov)
    result = learn_dictionary(highpass, config.cdl, seed=seed)
    quarter = max(1, len(result.objective) // 4)
    metrics = {
        "images": count,
        "objective_first": float(np.mean(result.objective[:quarter])),
        "objective_last": float(np.mean(result.objective[-quarter:])),
    }
    # Learning stops its codes early; purification does not.
    code = config.cdl.code.model_copy(update={"rounds": CbpdnConfig().rounds})
    return GlobalDictionary(result.atoms.cpu(), code, config.tikhonov), metrics


def save_global_dictionary(directory: Path, dictionary: GlobalDictionary, content: Mapping[str, Any]) -> None:
    """Write a dictionary as artifact `global_dictionary`."""
    description = {"cbpdn": dictionary.cbpdn.describe(), "tikhonov": dictionary.tikhonov.describe()}
    tensors = {"atoms": dictionary.atoms.float()}
    save_tensor_artifact(directory, KIND, ATOMS, tensors, {**description, **content})


def load_global_dictionary(directory: Path) -> GlobalDictionary:
    """Load a dictionary; `ArtifactError` when it is not one."""
    manifest = load_artifact(directory, KIND)
    try:
        cbpdn = CbpdnConfig.from_description(manifest["cbpdn"])
        tikhonov = TikhonovConfig.from_description(manifest["tikhonov"])
        atoms = load_tensors(directory / ATOMS)["atoms"]
    except (KeyError, ValidationError) as error:
        raise ArtifactError(f"{directory} holds no usable dictionary: {error}") from error
    if atoms.ndim != 4 or atoms.shape[1] != 3:
        raise ArtifactError(f"{directory}: atoms must be (M, 3, h, w), got {tuple(atoms.shape)}")
    return GlobalDictionary(atoms, cbpdn, tikhonov)
