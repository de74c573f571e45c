"""Stage iii of ACSR in plain torch: images in, purified images out (Algorithm 1, Eqs. 6 and 8).

Tikhonov split, choice of the nearest cluster by the robust encoder's latent, reconstruction, clip. The
paper's reconstruction is CBPDN of the high band with that cluster's dictionary plus the low band; the other
is the unrolled network of `acsr_ray.sparse.unrolled`, trained on attacks. Everything is purified; no image
is judged. The result for an image does not depend on the other images of a call: encoder, split, ADMM and
network always see micro-batches of a fixed shape, filled up with zeros, and coordinate descent takes images
one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from acsr_ray.clustering.gaussians import Gaussians
from acsr_ray.clustering.selection import Selection, select_cluster
from acsr_ray.models.classifier import ENCODER_MICRO_BATCH, encode, pad_batch, restore_encoder
from acsr_ray.purification.bands import split_bands
from acsr_ray.purification.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from acsr_ray.purification.micro_batches import in_micro_batches
from acsr_ray.purification.options import PurifyOptions
from acsr_ray.purification.response import response
from acsr_ray.purification.tiles import code_tiles
from acsr_ray.purification.unrolled import UnrolledReconstruction
from acsr_ray.sparse.cbpdn import Cbpdn
from acsr_ray.sparse.noise import noise_level


@dataclass(frozen=True)
class Purified:
    """Outcome of a batch of N images of one size.

    `images` (N, 3, H, W) in [0, 1]; `class_id`, `cluster_id` (N,) int32 of the chosen cluster, `distance`
    (N,) its Mahalanobis distance, `residual` (N,) the relative l2 change, `solved` (N,) False where the
    solver gave no finite result and the low band stands alone.
    """

    images: Tensor
    class_id: Tensor
    cluster_id: Tensor
    distance: Tensor
    residual: Tensor
    solved: Tensor


class Purifier(nn.Module):
    """Purify images with a bundle; differentiable in the images, so it can be attacked as a whole.

    A module like any other: `nn.Sequential(purifier, classifier)` is the defended classifier, for white-box
    attacks of any library. Its own weights are frozen; it goes along with `to(device)` and ignores `double()`
    and the like. Images out are float32 in [0, 1], so normalisation belongs behind it.

    Args:
        bundle: encoder, Gaussians and dictionaries.
        device: where to compute; images may come from anywhere.
        options: what is wanted beside the bundle's own ways.

    Raises:
        ArtifactError: the bundle has no such reconstruction.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", options: PurifyOptions | None = None) -> None:
        super().__init__()
        self.options = bundle.config.resolve(options or PurifyOptions())
        """What was asked for, and the bundle's own ways by name."""
        self.config = bundle.config.with_reconstruction(self.options.reconstruction)
        self.encoder = restore_encoder(bundle.config.encoder, bundle.encoder, device)
        strength = self.options.strength
        # A fixed strength of sparse coding is in the solver, whose rho follows it. Under `auto` the rho of
        # ADMM stays: one of its own for each image would need a factor of the x-step of its own.
        self._cbpdn = bundle.config.cbpdn
        if self.config.reconstruction == "cbpdn" and strength != "auto":
            assert strength is not None
            self._cbpdn = self._cbpdn.stronger(strength)
        self._place(torch.device(device), bundle.atoms, bundle.gaussians)
        self.unrolled = None
        if self.config.reconstruction == "unrolled":
            self.unrolled = UnrolledReconstruction(bundle, device, self.options.precision)

    @classmethod
    def load(
        cls,
        bundle: str | Path = DEFAULT_BUNDLE,
        device: str = "cpu",
        options: PurifyOptions | None = None,
    ) -> Self:
        """Load a bundle by directory or packaged name.

        Args:
            bundle: directory or name.
            device: where to compute.
            options: what is wanted beside the bundle's own ways.

        Raises:
            ArtifactError: it is absent or was changed, or has no such reconstruction.
        """
        return cls(load_bundle(bundle), device, options)

    def _place(self, device: torch.device, atoms: Tensor, gaussians: Gaussians) -> None:
        """Bring what is no parameter to a device."""
        self.device = device
        """Where it computes, whatever device images come from."""
        if device.type == "cuda":
            # TF32 convolutions differ from the CPU's by about 1e-3, enough to select other clusters, and
            # their last bits depend on where an image lies in a call (seen on an H100).
            torch.backends.cudnn.allow_tf32 = False
            # Some of its algorithms add up in whatever order their threads come.
            torch.backends.cudnn.deterministic = True
        # Distances are summed in float64, so that a tie in float32 cannot fall either way.
        self.gaussians = gaussians.to(str(device), torch.float64)
        self.solver = Cbpdn(atoms.to(device), self._cbpdn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Go to the device that a model around the purifier goes to, as a whole.

        Its precision stays: purified images do not depend on what the classifier behind computes in.
        """
        device = fn(torch.zeros(0, device=self.device)).device
        super()._apply(lambda tensor: tensor.to(device), recurse)  # type: ignore[no-untyped-call]
        if device != self.device:
            self._place(device, self.solver.atoms, self.gaussians)
        return self

    def train(self, mode: bool = True) -> Self:
        """Keep the frozen encoder in evaluation mode, whatever the model around the purifier does."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return purified images; see `purify` for the contract."""
        return self.purify(images).images

    def purify(self, images: Tensor) -> Purified:
        """Purify a batch of images of one size.

        Args:
            images: (N, 3, H, W) floating point in [0, 1], any size.

        Returns:
            The outcome, float32, on the purifier's device.

        Raises:
            ValueError: wrong shape, dtype or range, or values that are not finite.
        """
        check_images(images)
        images = images.to(self.device, torch.float32)
        selection = self.select(self.latents(images))
        return self.reconstruct(images, selection)

    def latents(self, images: Tensor) -> Tensor:
        """Return R_rob(x), (N, L), of images (N, 3, H, W) resized to the encoder's input."""
        return encode(self.encoder, images, self.config.encoder.image_size)

    def select(self, latents: Tensor) -> Selection:
        """Choose the cluster of each latent (N, L), or the best `top_k`; no label is known."""
        top_k = min(self.options.top_k, self.clusters)
        size = ENCODER_MICRO_BATCH[self.device.type]
        parts = []
        for part in latents.to(self.device, torch.float64).split(size):
            padded = pad_batch(part, size)
            chosen = select_cluster(padded, self.gaussians, self.config.selection, top_k)
            parts.append(chosen.rows(slice(len(part))))
        if not parts:
            return Selection(latents.new_zeros(0, dtype=torch.int64), latents.new_zeros(0))
        return Selection(
            torch.cat([part.index for part in parts]),
            torch.cat([part.distance for part in parts]).float(),
            None if top_k == 1 else torch.cat([part.candidates for part in parts]),
        )

    def reconstruct(self, images: Tensor, selection: Selection) -> Purified:
        """Split, reconstruct and clip.

        Args:
            images: (N, 3, H, W) float32 on the purifier's device, already checked.
            selection: cluster of each image.
        """
        if not len(images):
            return self._outcome(images, images, selection, selection.index.bool())
        lowpass, highpass = split_bands(images, self.config.tikhonov)
        rebuilt = torch.stack(
            [self._rebuild(lowpass, highpass, index) for index in self._clusters(selection).T]
        ).mean(0)
        # A latent that is not finite chose no cluster, whatever index came of it.
        solved = torch.isfinite(rebuilt).flatten(1).all(1) & torch.isfinite(selection.distance)
        rebuilt = torch.where(solved.view(-1, 1, 1, 1), rebuilt, lowpass)
        return self._outcome(images, rebuilt.clamp(0, 1), selection, solved)

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return len(self.gaussians.mean)

    @property
    def uses_clusters(self) -> bool:
        """Whether the pixels depend on the chosen cluster; not where a network is shared by all."""
        return self.unrolled is None or self.unrolled.config.sharing != "global"

    def _clusters(self, selection: Selection) -> Tensor:
        """Return the clusters (N, k) to reconstruct with."""
        return selection.candidates if self.uses_clusters else selection.index[:, None]

    def response(self, images: Tensor) -> Tensor:
        """Return the network's response (N,) float64 to its own output, by which strength `auto` may go.

        Args:
            images: as for `purify`.

        Raises:
            ValueError: as for `purify`, or the purifier has no network.
        """
        if self.unrolled is None:
            raise ValueError("only the unrolled reconstruction has a response")
        check_images(images)
        images = images.to(self.device, torch.float32)
        index = self.select(self.latents(images)).index
        rebuilt = self.unrolled(*split_bands(images, self.config.tikhonov), index)
        return self._response(self.unrolled, images, rebuilt, index)

    def _response(
        self, unrolled: UnrolledReconstruction, images: Tensor, rebuilt: Tensor, index: Tensor
    ) -> Tensor:
        once = rebuilt.clamp(0, 1)
        # The cluster stays: the question is what this network does again.
        twice = unrolled(*split_bands(once, self.config.tikhonov), index).clamp(0, 1)
        (answer,) = in_micro_batches(lambda *states: (response(*states),), images, once, twice)
        return answer

    def _rebuild(self, lowpass: Tensor, highpass: Tensor, index: Tensor) -> Tensor:
        """Return the reconstruction with one cluster for each image, not clipped."""
        if self.unrolled is None:
            return lowpass + self._code(highpass, index)
        images, strength = lowpass + highpass, self.options.strength
        rebuilt = self.unrolled(lowpass, highpass, index)
        if strength == 1:
            return rebuilt
        factor: Tensor | float
        if strength != "auto":
            assert strength is not None
            factor = strength
        else:
            if self.config.auto_by_response is None:
                own = self.config.auto_strength.of(noise_level(highpass))
            else:
                answer = self._response(self.unrolled, images, rebuilt, index)
                own = self.config.auto_by_response.of(answer)
            factor = own.to(images.dtype).view(-1, 1, 1, 1)
        return images + factor * (rebuilt - images)

    def _code(self, highpass: Tensor, index: Tensor) -> Tensor:
        """Return the sparse reconstruction of each high band with the dictionary of its cluster."""
        auto = self.options.strength == "auto"
        strength = self.config.auto_strength.of(noise_level(highpass)) if auto else None
        return code_tiles(self.solver, highpass, strength, index)

    def _outcome(self, images: Tensor, purified: Tensor, selection: Selection, solved: Tensor) -> Purified:
        residual = images.new_zeros(0)
        if len(images):
            (residual,) = in_micro_batches(_relative_change, purified, images)
        return Purified(
            purified,
            self.gaussians.class_id[selection.index],
            self.gaussians.cluster_id[selection.index],
            selection.distance,
            residual,
            solved,
        )


def _relative_change(purified: Tensor, images: Tensor) -> tuple[Tensor]:
    change = (purified - images).flatten(1).norm(dim=1)
    return (change / images.flatten(1).norm(dim=1).clamp(min=1e-12),)


def check_images(images: Tensor) -> None:
    """Raise `ValueError` unless images are (N, 3, H, W) finite floats in [0, 1]."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (N, 3, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}")
    if not torch.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity")
    if len(images) and (images.min() < 0 or images.max() > 1):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images must be in [0, 1], got values in [{low:.4g}, {high:.4g}]")
