"""The job train_defense: every kind from shards to an artifact that its defence takes."""

from typing import get_args

import pytest
import torch

from acsr_ray.artifacts import load_artifact
from acsr_ray.config import ConfigError
from acsr_ray.defenses.quilting import PatchBankConfig
from acsr_ray.evaluation.defenses import DefenseConfig, build_defense
from acsr_ray.models.autoencoder import AutoencoderConfig
from acsr_ray.models.pixel_cnn import PixelCnnConfig
from acsr_ray.sparse.cdl import CdlConfig
from acsr_ray.training.defense import TRAINERS, DefenseKind, TrainDefenseSettings, train_defense
from acsr_ray.training.global_dictionary import GlobalDictionaryConfig
from acsr_ray.training.reformers import MagnetTraining, PixelCnnTraining

SMALL = {
    "magnet": MagnetTraining(network=AutoencoderConfig(width=4, hidden=1), steps=2),
    "pixel_cnn": PixelCnnTraining(network=PixelCnnConfig(radius=1, width=8), steps=2),
    "global_dictionary": GlobalDictionaryConfig(cdl=CdlConfig(num_atoms=4, support=4, epochs=1)),
    "patch_bank": PatchBankConfig(count=30),
}
USED_BY = {
    "magnet": "magnet",
    "pixel_cnn": "pixel_defend",
    "global_dictionary": "stl",
    "patch_bank": "quilting",
}


def test_every_kind_has_a_trainer():
    assert set(TRAINERS) == set(get_args(DefenseKind)) == set(USED_BY)


@pytest.mark.parametrize("kind", USED_BY)
def test_shards_to_artifact_to_defense(kind, tmp_path, write_shard):
    shard = write_shard(tmp_path / "train.parquet", 8)
    output = tmp_path / kind
    settings = TrainDefenseSettings(
        kind=kind, train=(str(shard),), output=output, image_size=16, device="cpu", **SMALL
    )
    summary = train_defense(settings)
    manifest = load_artifact(output, kind)
    assert summary["train_images"] == manifest["metrics"]["train_images"] == 8
    assert manifest["metrics"] == summary
    assert kind in manifest["settings"]
    assert set(USED_BY) & manifest["settings"].keys() == {kind}
    defense = build_defense(DefenseConfig(name=USED_BY[kind], artifact=str(output)))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert defense(images).shape == images.shape


def test_patches_larger_than_the_images(tmp_path, write_shard):
    shard = write_shard(tmp_path / "train.parquet", 2)
    settings = TrainDefenseSettings(
        kind="patch_bank",
        train=(str(shard),),
        output=tmp_path / "out",
        image_size=8,
        patch_bank=PatchBankConfig(side=9),
    )
    with pytest.raises(ConfigError, match="patch_bank: pixels must be"):
        train_defense(settings)
    assert not (tmp_path / "out").exists()
