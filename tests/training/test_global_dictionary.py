"""The one dictionary: learnt from all images, better than its start, kept with its settings."""

import pytest
import torch

from acsr_ray.artifacts import ArtifactError
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.cdl import CdlConfig
from acsr_ray.training.global_dictionary import (
    GlobalDictionaryConfig,
    learn_global_dictionary,
    load_global_dictionary,
    save_global_dictionary,
)

CONFIG = GlobalDictionaryConfig(
    images=12,
    cdl=CdlConfig(num_atoms=6, support=4, epochs=3, batch_size=4, code=CbpdnConfig(iterations=10, rho=4.0)),
)


def test_learning_and_round_trip(smooth_pixels, tmp_path):
    learnt, metrics = learn_global_dictionary(smooth_pixels(20, 16, 16, 0), CONFIG, device="cpu", seed=0)
    assert metrics["images"] == 12
    assert metrics["objective_last"] < metrics["objective_first"]
    assert learnt.atoms.shape == (6, 3, 4, 4)
    assert torch.allclose(learnt.atoms.flatten(1).norm(dim=1), torch.ones(6), atol=1e-5)
    save_global_dictionary(tmp_path, learnt, {"metrics": metrics})
    loaded = load_global_dictionary(tmp_path)
    assert torch.equal(loaded.atoms, learnt.atoms)
    assert (loaded.cbpdn, loaded.tikhonov) == (CONFIG.cdl.code, CONFIG.tikhonov)


def test_seed_and_sample(smooth_pixels):
    pixels = smooth_pixels(20, 16, 16, 0)
    first, again, other = (
        learn_global_dictionary(pixels, CONFIG, device="cpu", seed=seed)[0].atoms for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    large = CONFIG.model_copy(update={"images": 500})
    assert learn_global_dictionary(pixels, large, device="cpu", seed=0)[1]["images"] == 20


def test_errors(smooth_pixels, tmp_path):
    with pytest.raises(ValueError, match="at least 4 pixels"):
        learn_global_dictionary(smooth_pixels(3, 3, 3, 0), CONFIG, device="cpu", seed=0)
    with pytest.raises(ArtifactError, match="no global_dictionary"):
        load_global_dictionary(tmp_path)
