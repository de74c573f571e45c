"""The trained reconstruction of a bundle, in fixed-shape micro-batches and aligned tiles."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acsr_ray.artifacts import ArtifactError
from acsr_ray.models.classifier import pad_batch
from acsr_ray.purification.bundle import Bundle
from acsr_ray.purification.options import Precision
from acsr_ray.purification.tiles import map_tiles
from acsr_ray.sparse.admm import SMALL_PIXELS
from acsr_ray.sparse.noise import noise_level
from acsr_ray.sparse.unrolled import UnrolledCsc

MICRO_BATCH = {"cpu": 16, "cuda": 256}
"""Images per call. Fixed, so that an image never depends on its neighbours."""
MICRO_PIXELS = 64 * 64
"""Larger images come in smaller calls, with as many pixels as so many times the number of images above; on
CPUs, those above `SMALL_PIXELS` one by one."""
KEPT_SIDE = 256
"""Side of what a tile keeps, rounded up to the grid; its halo is as wide as the network reaches."""


class UnrolledReconstruction(nn.Module):
    """Bands to purified images with a bundle's trained network.

    Args:
        bundle: with an unrolled reconstruction.
        device: where to compute.
        precision: of convolutions; sums of images stay in float32.

    Raises:
        ArtifactError: it has none, or weights that do not fit.
    """

    def __init__(self, bundle: Bundle, device: str, precision: Precision = "float32") -> None:
        super().__init__()
        config = bundle.config.unrolled
        if config is None:
            raise ArtifactError(f"bundle {bundle.config.name} has no unrolled reconstruction")
        self.config = config
        self.precision = precision
        network = restore_unrolled(bundle).requires_grad_(False).to(device)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, lowpass: Tensor, highpass: Tensor, cluster: Tensor) -> Tensor:
        """Return purified images (N, 3, H, W), not clipped.

        Args:
            lowpass: (N, 3, H, W).
            highpass: (N, 3, H, W).
            cluster: (N,) int64.
        """
        height, width = lowpass.shape[-2:]
        size = micro_batch(height, width, lowpass.device.type)
        bands = torch.cat([lowpass, highpass], 1)
        # Whole cells of the coarsest layer, or tiles would see other cells than the whole image does.
        grid = self.config.grid
        bands = F.pad(bands, (0, -width % grid, 0, -height % grid), mode="replicate")
        level = noise_level(highpass)
        if self.config.sharing != "filters":
            rows = list(torch.arange(len(bands), device=bands.device).split(size))
        else:
            rows = [
                part
                for position in cluster.unique().tolist()
                for part in (cluster == position).nonzero()[:, 0].split(size)
            ]
        results = [self._call(bands[r], cluster[r], level[r], size) for r in rows]
        return torch.cat(results)[torch.cat(rows).argsort()][..., :height, :width]

    def _call(self, bands: Tensor, cluster: Tensor, level: Tensor, size: int) -> Tensor:
        """Reconstruct at most `size` images, filled up to as many."""
        # One layout whatever came in, because it chooses the kernel; of the two this one is a tenth faster.
        padded = pad_batch(bands, size).contiguous(memory_format=torch.channels_last)
        function = partial(self._bands, cluster=fill_up(cluster, size), level=fill_up(level, size))
        halo = self.config.reach(self.network.support)
        # All three on the grid, so that every tile begins at a cell of the whole image.
        kept = -(-KEPT_SIDE // self.config.grid) * self.config.grid
        return map_tiles(function, padded, tile=kept + 2 * halo, halo=halo)[: len(bands)]

    def _bands(self, bands: Tensor, **state: Tensor) -> Tensor:
        lowpass, highpass = bands.chunk(2, 1)
        half = self.precision == "bfloat16"
        with torch.autocast(bands.device.type, torch.bfloat16, enabled=half):
            reconstruction: Tensor = self.network(lowpass, highpass, **state)
        return reconstruction.float()


def micro_batch(height: int, width: int, device: str) -> int:
    """Return the images per call; it depends on nothing but the size of the images and the device."""
    most = MICRO_BATCH[device]
    if device == "cpu" and height * width > SMALL_PIXELS:
        return 1
    return max(1, min(most, most * MICRO_PIXELS // (height * width)))


def fill_up(values: Tensor, size: int) -> Tensor:
    """Return (n,) values of n <= size images, the first repeated until there are `size`."""
    return torch.cat([values, values[:1].expand(size - len(values))])


def restore_unrolled(bundle: Bundle) -> UnrolledCsc:
    """Build the network of a bundle with its weights.

    Raises:
        ArtifactError: weights that do not fit.
    """
    config, weights = bundle.config.unrolled, bundle.reconstruction
    assert config is not None
    try:
        network = UnrolledCsc.from_weights(weights, config, len(bundle.atoms))
    except (KeyError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"reconstruction weights do not fit their settings: {error}") from error
    return network.eval()
