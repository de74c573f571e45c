"""A small PixelCNN: the probability of a pixel given a causal neighbourhood, as artifact `pixel_cnn`.

One masked convolution followed by 1 x 1 convolutions, which is a perceptron on the pixels above and to the
left within `radius`. The receptive field is therefore small on purpose: a pixel is evaluated from its
neighbourhood alone, and pixels on a skewed diagonal do not see each other. Channels follow in the order R,
G, B within one mixture of discretised logistics. Sources: van den Oord et al. 2016; Salimans et al. 2017
(the mixture). Shapes: n pixels, R neighbours, K mixture components, levels 0..255 as float.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Tensor, nn

from acsr_ray.artifacts import (
    ArtifactError,
    load_artifact,
    load_tensors,
    save_tensor_artifact,
)
from acsr_ray.config import Described

WEIGHTS = "weights.safetensors"
KIND = "pixel_cnn"
LEVELS = 256
SMALLEST_LOG_SCALE = -7.0
SMALLEST_MASS = 1e-5
"""Below, a level's mass is taken as density times width, since the difference of float32 cdfs is noise."""


class PixelCnnConfig(Described):
    """Shape of the network."""

    radius: int = Field(4, ge=1)
    """Rows above and columns on either side that a pixel depends on."""
    width: int = Field(160, ge=1)
    """Channels of the hidden layers."""
    blocks: int = Field(2, ge=0)
    """Residual blocks after the first layer."""
    mixtures: int = Field(5, ge=1)
    """K, logistics per pixel."""


class PixelCnn(nn.Module):
    """Mixture parameters of pixels from their causal neighbourhoods.

    Args:
        config: shape of the network.
    """

    row_offsets: Tensor
    column_offsets: Tensor

    def __init__(self, config: PixelCnnConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = zip(*causal_offsets(config.radius), strict=True)
        self.register_buffer("row_offsets", torch.tensor(rows), persistent=False)
        self.register_buffer("column_offsets", torch.tensor(columns), persistent=False)
        self.first = nn.Linear(4 * len(rows), config.width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Linear(config.width, config.width), nn.ReLU())
            for _ in range(config.blocks)
        )
        self.merges = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.blocks))
        self.last = nn.Linear(config.width, 10 * config.mixtures)

    def pad(self, levels: Tensor) -> Tensor:
        """Return a canvas (N, 4, H + r, W + 2r): colours in [-1, 1], zero outside, and where is inside.

        Args:
            levels: (N, 3, H, W), 0..255.
        """
        scaled = levels / 127.5 - 1
        inside = torch.ones_like(scaled[:, :1])
        radius = self.config.radius
        return F.pad(torch.cat([scaled, inside], 1), (radius, radius, radius, 0))

    def neighbourhoods(self, canvas: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return what the pixels depend on, (n, 4 R).

        Args:
            canvas: of `pad`.
            image: (n,) image of each pixel.
            rows: (n,) row in the image.
            columns: (n,) column in the image.
        """
        radius = self.config.radius
        row = rows[:, None] + radius + self.row_offsets
        column = columns[:, None] + radius + self.column_offsets
        return canvas[image[:, None], :, row, column].flatten(1)

    def forward(self, neighbourhoods: Tensor) -> Tensor:
        """Return mixture parameters (n, 10, K): weight, 3 means, 3 log scales, 3 couplings of channels."""
        x = self.first(neighbourhoods)
        for block, merge in zip(self.blocks, self.merges, strict=True):
            x = x + merge(block(x))
        return self.last(x.relu()).unflatten(1, (10, self.config.mixtures))


def causal_offsets(radius: int) -> list[tuple[int, int]]:
    """Return (row, column) offsets of the pixels before a pixel in raster order within a radius."""
    above = [(row, column) for row in range(-radius, 0) for column in range(-radius, radius + 1)]
    return above + [(0, column) for column in range(-radius, 0)]


def channel_log_mass(parameters: Tensor, channel: int, earlier: Tensor, levels: Tensor) -> Tensor:
    """Return the log probability of levels of one channel under every component, (n, V, K).

    Args:
        parameters: (n, 10, K) of the network.
        channel: 0 for R, 1 for G, 2 for B.
        earlier: (n, channel) levels of the channels before it, of the same pixel.
        levels: (n, V) the levels asked about.
    """
    mean = parameters[:, 1 + channel]
    # G leans on R; B on R and G.
    couplings = parameters[:, 7:].tanh()[:, {0: [], 1: [0], 2: [1, 2]}[channel]]
    mean = mean + (couplings * (earlier / 127.5 - 1)[:, :, None]).sum(1)
    log_scale = parameters[:, 4 + channel].clamp(min=SMALLEST_LOG_SCALE)
    centred = (levels / 127.5 - 1)[:, :, None] - mean[:, None]
    inverse = (-log_scale).exp()[:, None]
    upper, lower = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255)
    mass = upper.sigmoid() - lower.sigmoid()
    middle = inverse * centred
    density = middle - log_scale[:, None] - 2 * F.softplus(middle) + math.log(2 / 255)
    inner = torch.where(mass > SMALLEST_MASS, mass.clamp(min=SMALLEST_MASS).log(), density)
    at_start, at_end = levels[:, :, None] < 0.5, levels[:, :, None] > LEVELS - 1.5
    return torch.where(at_start, F.logsigmoid(upper), torch.where(at_end, F.logsigmoid(-lower), inner))


def log_likelihood(parameters: Tensor, levels: Tensor) -> Tensor:
    """Return the log probability (n,) of whole pixels, levels (n, 3), in nats."""
    joint = parameters[:, 0].log_softmax(1)
    for channel in range(3):
        mass = channel_log_mass(parameters, channel, levels[:, :channel], levels[:, channel : channel + 1])
        joint = joint + mass[:, 0]
    return joint.logsumexp(1)


@torch.no_grad()
def most_likely_nearby(model: PixelCnn, levels: Tensor, reach: int) -> Tensor:
    """Replace every value by the most probable one within `reach` levels, given those replaced before it.

    Pixels go in raster order, as PixelDefend's greedy decoding does; those of one skewed diagonal at once,
    because none lies in the neighbourhood of another.

    Args:
        model: the PixelCNN.
        levels: (N, 3, H, W) float, 0..255.
        reach: largest change in levels.

    Returns:
        (N, 3, H, W) float, 0..255.
    """
    canvas, radius = model.pad(levels), model.config.radius
    height, width = levels.shape[2:]
    result = levels.clone()
    rows, columns = (
        index.flatten()
        for index in torch.meshgrid(
            torch.arange(height, device=levels.device),
            torch.arange(width, device=levels.device),
            indexing="ij",
        )
    )
    front = columns + (radius + 1) * rows
    steps = torch.arange(-reach, reach + 1, device=levels.device)
    for position in range(int(front.max()) + 1):
        here = (front == position).nonzero()[:, 0]
        if not len(here):
            continue
        image = torch.arange(len(levels), device=levels.device).repeat_interleave(len(here))
        row, column = rows[here].repeat(len(levels)), columns[here].repeat(len(levels))
        parameters = model(model.neighbourhoods(canvas, image, row, column))
        weight = parameters[:, 0].log_softmax(1)
        chosen = levels.new_zeros((len(image), 0))
        for channel in range(3):
            given = levels[image, channel, row, column]
            candidates = (given[:, None] + steps).clamp(0, LEVELS - 1)
            mass = channel_log_mass(parameters, channel, chosen, candidates) + weight[:, None]
            best = mass.logsumexp(2).argmax(1, keepdim=True)
            chosen = torch.cat([chosen, candidates.gather(1, best)], 1)
            weight = mass.gather(1, best[:, :, None].expand(-1, -1, mass.shape[2]))[:, 0]
        result[image, :, row, column] = chosen
        canvas[image, :3, row + radius, column + radius] = chosen / 127.5 - 1
    return result


def save_pixel_cnn(directory: Path, model: PixelCnn, content: Mapping[str, Any]) -> None:
    """Write a trained network as artifact `pixel_cnn`."""
    description = {"pixel_cnn": model.config.describe(), **content}
    save_tensor_artifact(directory, KIND, WEIGHTS, model.state_dict(), description)


def load_pixel_cnn(directory: Path, device: str = "cpu") -> PixelCnn:
    """Load a network, frozen; `ArtifactError` when it is not one."""
    manifest = load_artifact(directory, KIND)
    try:
        model = PixelCnn(PixelCnnConfig.from_description(manifest["pixel_cnn"]))
        model.load_state_dict(load_tensors(directory / WEIGHTS))
    except (KeyError, ValidationError, RuntimeError) as error:
        raise ArtifactError(f"{directory} holds no usable PixelCNN: {error}") from error
    return model.requires_grad_(False).eval().to(device)
