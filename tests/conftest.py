"""Fixtures shared by the tests: images, small shards, a tiny bundle, a network on digits, a local Ray."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from xdist.scheduler import LoadScopeScheduling

from acsr_ray.clustering.gaussians import fit_gaussians
from acsr_ray.models.classifier import EncoderConfig, encode, restore_encoder
from acsr_ray.models.targets import TargetConfig, build_target, save_target
from acsr_ray.models.wide_resnet import build_wide_resnet
from acsr_ray.purification.bundle import Bundle, BundleConfig, bundle_digest, load_bundle, save_bundle
from acsr_ray.purification.doubt import FEATURES, DoubtModel, Logistic, save_doubt
from acsr_ray.purification.judge import OWN_CLASSES
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.prox import project_atoms
from acsr_ray.sparse.unrolled import UnrolledConfig, UnrolledCsc, spread_atoms

torch.set_num_threads(1)

HELD_OUT = 120
CLASS_NAMES = ("ant", "bee", "cat")
# (class, cluster within the class) of the tiny bundle's four clusters.
CLUSTERS = np.array([(0, 0), (0, 1), (1, 0), (2, 0)])
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@cache
def starts_ray(file: str) -> bool:
    """Return whether a test file starts Ray."""
    text = (Path(__file__).parents[1] / file).read_text()
    return "mark.ray" in text or "ray_local" in text


class ByFile(LoadScopeScheduling):
    """With `-n`, each file is one process's, so that its fixtures are made once, and all Ray is in one.

    On two cores, two Rays that start at once take longer than Ray waits for a node of its own.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if starts_ray(file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Deal tests out by file, in their order."""
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put Ray first: its process takes the longest."""
    items.sort(key=lambda item: not starts_ray(item.nodeid.split("::")[0]))


def draw_smooth(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Return smooth random RGB images with some texture, (count, height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    images = [Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC) for grid in coarse]
    texture = generator.normal(0, 12, (count, height, width, 3))
    return np.clip(np.stack([np.asarray(image) for image in images]) + texture, 0, 255).astype(np.uint8)


def encode_image(pixels: np.ndarray, fmt: str = "PNG", **options: Any) -> bytes:
    """Encode (H, W, 3) or (H, W) uint8 pixels with Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt, **options)
    return buffer.getvalue()


def image_table(cells: Sequence[bytes | None]) -> pa.Table:
    """Return a table in the Hugging Face layout: id, image {bytes, path}, label, caption."""
    names = [f"{row}.png" for row in range(len(cells))]
    images = [{"bytes": data, "path": name} for data, name in zip(cells, names, strict=True)]
    features = {
        "id": {"dtype": "int64", "_type": "Value"},
        "image": {"_type": "Image"},
        "label": {"names": list(CLASS_NAMES), "_type": "ClassLabel"},
        "caption": {"dtype": "string", "_type": "Value"},
    }
    columns = {
        "id": pa.array(range(1000, 1000 + len(cells)), pa.int64()),
        "image": pa.array(images, IMAGE_TYPE),
        "label": pa.array([row % 3 for row in range(len(cells))], pa.int64()),
        "caption": pa.array([None if row % 4 == 3 else f"image {row}" for row in range(len(cells))]),
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def write_table(path: Path, table: pa.Table, row_group_size: int | None = None) -> Path:
    """Write a table as Parquet, making the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_image_shard(
    path: Path, count: int = 6, side: int = 16, seed: int = 0, row_group_size: int | None = None
) -> Path:
    """Write a shard of `count` smooth PNG images of one size in the Hugging Face layout."""
    cells = [encode_image(pixels) for pixels in draw_smooth(count, side, side, seed)]
    return write_table(path, image_table(cells), row_group_size)


def build_tiny_bundle(directory: Path, **config: Any) -> Path:
    """Save a bundle with a random but fixed WRN-10-1, four clusters of three classes and 8 atoms of 3x5x5.

    Args:
        directory: where.
        config: fields of `BundleConfig` that replace the defaults below.
    """
    encoder = EncoderConfig(architecture="wrn-10-1", num_classes=len(CLASS_NAMES), image_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        weights = build_wide_resnet(encoder.architecture, encoder.num_classes).state_dict()
        atoms = torch.stack([project_atoms(torch.randn(8, 3, 5, 5)) for _ in CLUSTERS])
    images = torch.from_numpy(draw_smooth(160, 16, 16, seed=11)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        latents = encode(restore_encoder(encoder, weights), images, encoder.image_size).numpy()
    # Quarters along the main direction of the latents: clusters that new images really choose between.
    centred = latents - latents.mean(0)
    rank = (centred @ np.linalg.svd(centred, full_matrices=False)[2][0]).argsort().argsort()
    quarter = rank * len(CLUSTERS) // len(rank)
    gaussians = fit_gaussians(latents, CLUSTERS[quarter, 0], CLUSTERS[quarter, 1])
    settings = {
        "name": "tiny",
        "class_names": CLASS_NAMES,
        "encoder": encoder,
        "cbpdn": CbpdnConfig(iterations=10),
        **config,
    }
    bundle = Bundle(BundleConfig(**settings), weights, gaussians, atoms)
    save_bundle(directory, bundle, {"origin": "tests"})
    return directory


def move_weights(network: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    """Move every parameter at random, as training would, so that none is zero or like another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return network


def build_unrolled_bundle(
    directory: Path,
    sharing: str = "global",
    *,
    reconstruction: str = "unrolled",
    network: UnrolledConfig | None = None,
    **config: Any,
) -> Path:
    """Save the tiny bundle with an unrolled network of random weights near their start.

    Args:
        directory: where.
        sharing: what its clusters have of their own.
        reconstruction: the bundle's default.
        network: other settings of the network, of whatever sharing.
        config: as for `build_tiny_bundle`.
    """
    bundle = load_bundle(build_tiny_bundle(directory, **config))
    shape = (network or UnrolledConfig(iterations=2, stride=3, deeper=(6,))).model_dump()
    settings = UnrolledConfig(**{**shape, "sharing": sharing})
    atoms = bundle.atoms if sharing == "filters" else spread_atoms(bundle.atoms, 12)[None]
    generator = torch.Generator().manual_seed(7)
    # Thresholds low enough for every layer to have codes on the tests' images.
    unrolled = UnrolledCsc(atoms, settings, len(bundle.atoms), 0.01, generator)
    weights = move_weights(unrolled, seed=8, size=0.05).state_dict()
    update = {"reconstruction": reconstruction, "unrolled": settings}
    changed = replace(bundle, config=bundle.config.model_copy(update=update), reconstruction=weights)
    save_bundle(directory, changed, {"origin": "tests"})
    return directory


@pytest.fixture(scope="session")
def smooth_pixels() -> Callable[..., np.ndarray]:
    return draw_smooth


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    return encode_image


@pytest.fixture(scope="session")
def hf_table() -> Callable[..., pa.Table]:
    return image_table


@pytest.fixture(scope="session")
def write_parquet() -> Callable[..., Path]:
    return write_table


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., Path]:
    return write_image_shard


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    return build_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def save_tiny_doubt(directory: Path, purifier: Path, classifier: str = OWN_CLASSES, **changes: Any) -> Path:
    """Save a doubt model for a bundle, with coefficients that are no one's; `changes` replace its fields."""
    logistic = Logistic(
        features=FEATURES,
        mean=(-2.0, 1.5, -3.0, 0.3, 1.0, 0.2),
        scale=(0.5, 0.3, 0.7, 0.5, 2.0, 0.4),
        coefficients=(0.4, 0.3, -0.2, 0.9, -0.8, 0.5),
        intercept=-0.7,
    )
    fields = {
        "bundle": bundle_digest(purifier),
        "options": PurifyOptions(reconstruction="cbpdn", strength=1.0),
        "classifier": classifier,
        "image_size": 16,
        "logistic": logistic,
        **changes,
    }
    save_doubt(directory, DoubtModel(**fields), {"origin": "tests"})
    return directory


@pytest.fixture(scope="session")
def make_doubt() -> Callable[..., Path]:
    return save_tiny_doubt


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random but fixed target of three classes for images of 20 pixels a side."""
    config = TargetConfig(architecture="wrn-10-1", num_classes=len(CLASS_NAMES), image_size=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model = build_target(config)
    images = torch.from_numpy(draw_smooth(60, 20, 20, seed=12)).permute(0, 3, 1, 2) / 255
    # Centred and sharper than a random network is, so that images really are of several classes.
    with torch.no_grad():
        model.eval().fc.weight *= 20
        model.fc.bias -= model(images).mean(0)
    directory = tmp_path_factory.mktemp("target") / "tiny"
    save_target(directory, model, config, CLASS_NAMES, {"origin": "tests"})
    return directory


@pytest.fixture(scope="session")
def make_unrolled_bundle() -> Callable[..., Path]:
    return build_unrolled_bundle


@pytest.fixture(scope="session")
def moved() -> Callable[..., nn.Module]:
    return move_weights


@pytest.fixture(scope="session")
def unrolled_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose default is a network that all clusters share."""
    return build_unrolled_bundle(tmp_path_factory.mktemp("bundle") / "unrolled")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with two CPUs, started when the first test asks for it."""
    import ray

    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Digits:
    """A trained network, in evaluation mode, and images it has not seen."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def head(self, count: int) -> tuple[Tensor, Tensor]:
        return self.images[:count], self.labels[:count]


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Return a small network trained in seconds on scikit-learn's digits, 16 x 16 RGB on the 8-bit grid."""
    data = load_digits()
    gray = torch.from_numpy(data.images).float()[:, None] / 16
    # Off the bounds of [0, 1] on average, as photos are, and coloured, so that channels differ.
    tint = torch.tensor([0.8, 0.7, 0.6]).view(1, 3, 1, 1)
    images = 0.1 + F.interpolate(gray, (16, 16), mode="bilinear") * tint
    images = (images * 255).round() / 255
    labels = torch.from_numpy(data.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 16, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        train = torch.arange(HELD_OUT, len(images))
        for _ in range(14):
            for rows in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    model.requires_grad_(False).eval()
    held_out = images[:HELD_OUT], labels[:HELD_OUT]
    assert (model(held_out[0]).argmax(1) == held_out[1]).float().mean() > 0.9
    return Digits(model, *held_out)
