"""A small network trained in seconds on scikit-learn's digits, 16 x 16 RGB on the 8-bit grid."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

TEST_IMAGES = 120


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
        train = torch.arange(TEST_IMAGES, len(images))
        for _ in range(14):
            for rows in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    model.requires_grad_(False).eval()
    held_out = images[:TEST_IMAGES], labels[:TEST_IMAGES]
    assert (model(held_out[0]).argmax(1) == held_out[1]).float().mean() > 0.9
    return Digits(model, *held_out)
