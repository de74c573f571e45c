"""Unrolled convolutional sparse coding: a few iterations of ISTA whose every filter and threshold is learnt.

CBPDN (Eq. 6) by proximal steps is z <- soft(z + E (h - D z), theta), where D puts the atoms together and E
analyses. With E = D^T / L, L the largest eigenvalue of D D^T, this is ISTA; with E = D^T (D D^T + rho)^-1,
the x-step of ADMM, a few steps already describe all but the noise, since atoms that overlap no longer slow
each other down. Cut to K iterations, with E, D and theta of each iteration free, it is a network (LISTA,
Gregor and LeCun 2010) that starts as the solver and can be trained for its use. Ours and not the paper's:

- Atoms are `stride` pixels apart, so there are stride^2 times fewer coefficients and products.
- The codes may be coded again by deeper dictionaries at half the resolution each (multi-layer sparse coding,
  Sulam et al. 2018): an iteration goes down through the layers and up again, where what a deeper code
  explains is added before the threshold. The deeper layers see more of the image, which a perturbation of
  low frequency needs; they explain nothing at first.
- The low band of the Tikhonov split, which the paper passes on untouched, is coded beside the high band by
  the same maps. Its filters start at zero, so at first it passes.
- theta may grow with the noise of the image (CDLNet, Janjusevic et al. 2022).

Shapes: N images, H x W pixels, M atoms of the first layer with support s, K iterations, P sets of
thresholds or filters.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.linalg import qr
from torch import Tensor, nn

from acsr_ray.config import Described
from acsr_ray.sparse.noise import noise_level
from acsr_ray.sparse.prox import soft_threshold

Sharing = Literal["global", "thresholds", "filters"]
DEEPER_SUPPORT = 4
DEEPER_STRIDE = 2
RIDGE_SIDE = 96
"""Side in pixels of the image on which the starting analysis is computed."""
RIDGE_SHARE = 0.2
"""Its regularisation, as a share of the mean eigenvalue."""
NOISE_UNIT = 0.01
"""Noise levels are given to the thresholds in this unit, about 2.5 grey levels."""
MID_GREY = 0.5


class UnrolledConfig(Described):
    """Shape of the network; a bundle records it beside the weights."""

    iterations: int = Field(3, ge=1)
    """K: unrolled iterations, each with filters and thresholds of its own."""
    stride: int = Field(2, ge=1)
    """Pixels between neighbouring positions of an atom."""
    deeper: tuple[int, ...] = (96, 128)
    """Atoms of each deeper layer, at half the resolution of the one above; () is plain sparse coding."""
    low_band: Literal["passed", "coded"] = "coded"
    """`passed`: the low band goes through untouched, as in the paper; `coded`: it is repaired too."""
    noise_adaptive: bool = True
    """Whether thresholds grow with the image's noise level by a learnt factor."""
    sharing: Sharing = "global"
    """What clusters have of their own: nothing, their thresholds, or all filters and thresholds."""

    @property
    def grid(self) -> int:
        """Height and width are brought to multiples of this."""
        return self.stride * DEEPER_STRIDE ** len(self.deeper)

    def reach(self, support: int) -> int:
        """Return how far in pixels a pixel can influence the result, rounded up to the grid.

        Args:
            support: side of the first layer's atoms.
        """
        # Analysis and synthesis each spread by half of their support, in pixels of what they read.
        scales = [self.stride * DEEPER_STRIDE**level for level in range(len(self.deeper))]
        spread = self.iterations * (support + DEEPER_SUPPORT * sum(scales)) + support
        return -(-spread // self.grid) * self.grid


class UnrolledCsc(nn.Module):
    """The network. Images of any size; differentiable.

    Args:
        atoms: (F, M, 3, s, s) atoms that the first layer starts from: one set of P where clusters have
            filters of their own, else a single set.
        config: its shape.
        clusters: P.
        lmbda: weight of the l1 term that the thresholds start from.
        generator: of the deeper layers' random start.
        analysis: (F, M, 3, s, s) filters E to start from; by default those of `ridge_analysis`.

    Raises:
        ValueError: atoms whose number or size does not fit the config.
    """

    def __init__(
        self,
        atoms: Tensor,
        config: UnrolledConfig,
        clusters: int = 1,
        lmbda: float = 0.1,
        generator: torch.Generator | None = None,
        analysis: Tensor | None = None,
    ) -> None:
        super().__init__()
        sets = clusters if config.sharing == "filters" else 1
        if atoms.ndim != 5 or len(atoms) != sets or atoms.shape[2] != 3:
            raise ValueError(f"atoms must be ({sets}, M, 3, s, s), got {tuple(atoms.shape)}")
        if config.stride > atoms.shape[-1] or (atoms.shape[-1] - config.stride) % 2:
            raise ValueError(f"stride {config.stride} does not fit atoms of {atoms.shape[-1]} pixels")
        self.config = config
        widths = (atoms.shape[1], *config.deeper)
        deeper = [
            torch.randn((width, above, DEEPER_SUPPORT, DEEPER_SUPPORT), generator=generator)
            for above, width in zip(widths, config.deeper, strict=False)
        ]
        thresholds = clusters if config.sharing == "thresholds" else 1
        if analysis is None:
            analysis = torch.stack([ridge_analysis(own, config.stride) for own in atoms])
        self.members = nn.ModuleList(
            _Member(*filters, deeper, config, thresholds, lmbda)
            for filters in zip(atoms, analysis, strict=True)
        )

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], config: UnrolledConfig, clusters: int) -> Self:
        """Build the network that `weights`, a state dict, belong to, and load them.

        Raises:
            KeyError, RuntimeError, ValueError: they do not fit the config.
        """
        sets = clusters if config.sharing == "filters" else 1
        count, _, *support = weights["members.0.analysis.0.0"].shape
        # Anything but the ridge analysis, which takes seconds for filters of many clusters.
        blank = torch.ones((sets, count, 3, *support))
        network = cls(blank, config, clusters, analysis=blank)
        network.load_state_dict(dict(weights))
        return network

    @property
    def atoms(self) -> int:
        """M."""
        return len(_at(cast(_Member, self.members[0]).analysis, 0)[0])

    @property
    def support(self) -> int:
        """Side of the first layer's atoms in pixels."""
        return _at(cast(_Member, self.members[0]).analysis, 0)[0].shape[-1]

    def forward(
        self,
        lowpass: Tensor,
        highpass: Tensor,
        cluster: Tensor | None = None,
        *,
        level: Tensor | None = None,
    ) -> Tensor:
        """Return the purified images, not yet clipped.

        Args:
            lowpass: (N, 3, H, W) low band.
            highpass: (N, 3, H, W) high band, with the low band the image.
            cluster: (N,) int64 in 0..P - 1; not needed where everything is shared.
            level: (N,) noise level of the images, for tiles of a larger one; measured here when omitted.
        """
        if cluster is None and self.config.sharing != "global":
            raise ValueError(f"clusters have {self.config.sharing} of their own: cluster is needed")
        if level is None:
            level = noise_level(highpass)
        if cluster is None or self.config.sharing != "filters":
            return self.members[0](lowpass, highpass, cluster, level)
        parts, positions = [], []
        # In training every set takes part, if only without rows: distributed training needs all gradients.
        sets = range(len(self.members)) if self.training else cluster.unique().tolist()
        for position in sets:
            rows = (cluster == position).nonzero()[:, 0]
            parts.append(self.members[position](lowpass[rows], highpass[rows], None, level[rows]))
            positions.append(rows)
        return torch.cat(parts)[torch.cat(positions).argsort()]


class _Member(nn.Module):
    """One set of filters, with one or several sets of thresholds."""

    def __init__(
        self,
        atoms: Tensor,
        analysis: Tensor,
        deeper: Sequence[Tensor],
        config: UnrolledConfig,
        clusters: int,
        lmbda: float,
    ) -> None:
        super().__init__()
        self.config = config
        # Filters and thresholds are stored in units of the analysis' size, so that an optimiser which moves
        # all parameters alike (Adam) moves them in proportion.
        step = (analysis.norm() / atoms.norm()).item()
        self.step: Tensor
        self.register_buffer("step", torch.tensor(step))
        self.unit: Tensor
        self.register_buffer("unit", torch.tensor(lmbda * step))
        coded_low = config.low_band == "coded"

        def banded(filters: Tensor) -> Tensor:
            return torch.cat([filters, torch.zeros_like(filters)], 1) if coded_low else filters

        below = [filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for filters in deeper]
        self.analysis = nn.ModuleList(
            [_each(config, filters) for filters in (banded(analysis / step), *below)]
        )
        self.synthesis = nn.ModuleList(
            [_each(config, banded(atoms)), *(_each(config, torch.zeros_like(filters)) for filters in below)]
        )
        widths = (len(atoms), *config.deeper)
        self.thresholds = nn.ModuleList(_each(config, torch.ones(clusters, width)) for width in widths)
        self.noise_slopes = nn.ModuleList(
            _each(config, torch.zeros(clusters, width)) for width in widths if config.noise_adaptive
        )

    def forward(self, lowpass: Tensor, highpass: Tensor, cluster: Tensor | None, level: Tensor) -> Tensor:
        height, width = highpass.shape[-2:]
        coded_low = self.config.low_band == "coded"
        bands = torch.cat([highpass, lowpass - MID_GREY], 1) if coded_low else highpass
        grid = self.config.grid
        signal = F.pad(bands, (0, -width % grid, 0, -height % grid), mode="replicate")
        theta = self._theta(cluster, level)
        codes: list[Tensor] = []
        for iteration in range(self.config.iterations):
            codes = self._iterate(signal, codes, iteration, theta[iteration])
        output = _at(self.synthesis, -1)[0]
        coded = _up(codes[0], output, self.config.stride)[..., :height, :width]
        return lowpass + coded[:, :3] + (coded[:, 3:] if coded_low else 0)

    def _theta(self, cluster: Tensor | None, level: Tensor) -> list[list[Tensor]]:
        """Return the thresholds of each iteration and layer, (N or 1, width, 1, 1)."""

        def own(table: Tensor) -> Tensor:
            return table[cluster] if cluster is not None and len(table) > 1 else table

        thresholds = []
        for iteration in range(self.config.iterations):
            theta = [own(table) for table in _at(self.thresholds, iteration)]
            if self.config.noise_adaptive:
                noise = (level / NOISE_UNIT)[:, None]
                slopes = _at(self.noise_slopes, iteration)
                theta = [base + noise * own(slope) for base, slope in zip(theta, slopes, strict=True)]
            thresholds.append([(self.unit * F.relu(values))[..., None, None] for values in theta])
        return thresholds

    def _iterate(
        self, signal: Tensor, codes: Sequence[Tensor], iteration: int, theta: Sequence[Tensor]
    ) -> list[Tensor]:
        """Go down through the layers, each coding what lies above it, and up again.

        Args:
            signal: (N, C, H, W) bands.
            codes: of each layer; () at first, when all are zero.
            iteration: its number.
            theta: thresholds of each layer.
        """
        down, up = _at(self.analysis, iteration), _at(self.synthesis, iteration)
        # Codes are read by the filters of the iteration that made them; those of the last give the image.
        before = _at(self.synthesis, iteration - 1)
        strides = [self.config.stride, *[DEEPER_STRIDE] * len(self.config.deeper)]
        reached: list[Tensor] = []
        above = signal
        for layer, stride in enumerate(strides):
            residual = above - _up(codes[layer], before[layer], stride) if codes else above
            update = _down(residual, down[layer], stride)
            if not layer:
                update = self.step * update
            reached.append(codes[layer] + update if codes else update)
            above = soft_threshold(reached[layer], theta[layer])
        new = [above]
        for layer in range(len(reached) - 2, -1, -1):
            explained = _up(new[0], up[layer + 1], DEEPER_STRIDE)
            new.insert(0, soft_threshold(reached[layer] + explained, theta[layer]))
        return new


def spread_atoms(atoms: Tensor, count: int) -> Tensor:
    """Choose atoms that differ most: pivoted QR, each the one with most left beside those before it.

    Dictionaries of many clusters have near copies of some atoms, which would only make D D^T worse to invert.

    Args:
        atoms: (K, M, C, h, w) of all clusters.
        count: how many to choose, at most K M.

    Returns:
        (count, C, h, w).
    """
    flat = atoms.flatten(0, 1)
    if count > len(flat):
        raise ValueError(f"{count} atoms cannot be chosen from {len(flat)}")
    order = qr(flat.flatten(1).double().numpy().T, pivoting=True, mode="r")[-1]
    return flat[torch.from_numpy(order[:count].astype("int64"))].clone()


def _down(signal: Tensor, filters: Tensor, stride: int) -> Tensor:
    return F.conv2d(signal, filters, stride=stride, padding=(filters.shape[-1] - stride) // 2)


def _up(code: Tensor, filters: Tensor, stride: int) -> Tensor:
    return F.conv_transpose2d(code, filters, stride=stride, padding=(filters.shape[-1] - stride) // 2)


def ridge_analysis(atoms: Tensor, stride: int, rho: float | None = None) -> Tensor:
    """Return the filters of E = D^T (D D^T + rho)^-1 for atoms `stride` pixels apart, cut to their support.

    Neighbouring pixels of a cell of stride x stride are channels of a coarser image, on which D is a plain
    convolution and diagonal over frequencies.

    Args:
        atoms: (M, C, s, s).
        stride: pixels between positions of an atom.
        rho: regularisation; by default a fifth of the mean eigenvalue of D D^T.

    Returns:
        (M, C, s, s), to be correlated with the image at every position of an atom.
    """
    count, channels, support, _ = atoms.shape
    side = RIDGE_SIDE // stride
    cells = -(-support // stride)
    # (M, C stride^2, cells, cells): what an atom puts into each cell.
    padded = F.pad(atoms.double(), (0, cells * stride - support) * 2)
    folded = F.pixel_unshuffle(padded, stride)
    forward = torch.fft.fft2(folded, s=(side, side)).permute(2, 3, 1, 0)
    gram = forward @ forward.mH
    pixels = channels * stride**2
    identity = torch.eye(pixels, dtype=gram.dtype)
    if rho is None:
        rho = RIDGE_SHARE * gram.diagonal(dim1=-2, dim2=-1).real.mean().item()
    inverse = torch.linalg.inv(gram + rho * identity) @ forward
    filters = torch.fft.ifft2(inverse.permute(3, 2, 0, 1)).real[..., :cells, :cells]
    unfolded = F.pixel_shuffle(filters.reshape(count, pixels, cells, cells), stride)
    return unfolded[..., :support, :support].to(atoms)


def _at(layers: nn.ModuleList, iteration: int) -> list[Tensor]:
    """Return each layer's parameter of one iteration."""
    return [cast(nn.ParameterList, layer)[iteration] for layer in layers]


def _each(config: UnrolledConfig, start: Tensor) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(start.clone()) for _ in range(config.iterations)])
