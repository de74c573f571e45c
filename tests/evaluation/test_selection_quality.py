"""Selection before and after an attack, on latents whose answer is known."""

import numpy as np
import pytest
import torch

from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.clustering.gaussians import Gaussians
from acsr_ray.corpus.labelled import read_labelled, sample_rows
from acsr_ray.evaluation.selection_quality import HeldOutLatents, held_out_latents, selection_outcome
from acsr_ray.models.classifier import EncoderConfig, encode, save_classifier
from acsr_ray.models.wide_resnet import build_wide_resnet


def test_outcome_of_every_kind():
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    ids = torch.tensor([0, 0, 1], dtype=torch.int32)
    gaussians = Gaussians(ids, torch.tensor([0, 1, 0]), ids, means, eye, torch.zeros(3, dtype=torch.float64))
    # Kept; another cluster of the class; another class; wrong before and after in the same cluster.
    clean, attacked = means[[0, 0, 1, 2]], means[[0, 1, 2, 2]]
    found = selection_outcome(
        HeldOutLatents(clean, attacked, np.array([0, 0, 0, 0])), gaussians, "mahalanobis"
    )
    assert found.own_clean.tolist() == [True, True, True, False]
    assert found.own_attacked.tolist() == [True, True, False, False]
    assert found.same.tolist() == [True, False, False, True]


@pytest.fixture
def encoder(tmp_path):
    config = EncoderConfig(architecture="wrn-10-1", num_classes=3, image_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_wide_resnet(config.architecture, config.num_classes)
    save_classifier(tmp_path / "robust", "robust", model, config, ("a", "b", "c"), {})
    return model.eval(), tmp_path / "robust"


def test_latents_are_those_of_the_encoder_and_of_attacked_images(encoder, write_shard, tmp_path):
    model, folder = encoder
    shard = str(write_shard(tmp_path / "shard.parquet", 20, 16))
    found = held_out_latents(folder, "robust", [shard], 12, ThreatModel("l2", 0.5), "cpu")
    data = read_labelled([shard], 16)
    chosen = sample_rows(20, 12)
    assert len(set(chosen.tolist())) == 12
    assert chosen.max() > 12
    images = torch.from_numpy(data.pixels[chosen]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = encode(model, images, 16).double()
    torch.testing.assert_close(found.clean, expected)
    np.testing.assert_array_equal(found.labels, data.labels[chosen])
    # The attack lowers the score of the label, through the same encoder.
    with torch.no_grad():
        before, after = (
            torch.nn.functional.cross_entropy(model.fc(part.float()), torch.from_numpy(found.labels))
            for part in (found.clean, found.attacked)
        )
    assert after > before + 0.01


def test_half_precision_is_that_of_the_rounded_weights(encoder, write_shard, tmp_path):
    model, folder = encoder
    shard = str(write_shard(tmp_path / "shard.parquet", 6, 16))
    found = held_out_latents(folder, "robust", [shard], 6, ThreatModel("l2", 0.5), "cpu", half=True)
    images = torch.from_numpy(read_labelled([shard], 16).pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        whole = encode(model, images, 16).double()
        rounded = encode(model.half().float(), images, 16).double()
    torch.testing.assert_close(found.clean, rounded)
    assert not torch.equal(found.clean, whole)
