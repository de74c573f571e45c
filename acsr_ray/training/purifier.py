"""Training of the unrolled reconstruction on pairs of attacked images and their originals.

min over the network T of E[ w |T(x') - x|_1 + KL(f(x) || f(T(x'))) ] subject to a bound on what T costs clean
images, with x' from attacks on surrogate classifiers f (Nie et al. and IRAD train on such pairs too; the
network is ours, see `acsr_ray.sparse.unrolled`). The target that is to be defended is never seen.

The bound is on an accuracy, which has no gradient, so the weights follow the divergence of clean images and
the multiplier the accuracy (proxy Lagrangian, Cotter et al. 2019).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from acsr_ray.attacks.pgd import attack_pixels
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.config import Described
from acsr_ray.corpus.labelled import LabelledImages, sample_rows
from acsr_ray.corpus.units import Unit
from acsr_ray.models.targets import load_target
from acsr_ray.purification.bands import split_bands
from acsr_ray.purification.bundle import AutoStrength, Bundle, load_bundle
from acsr_ray.purification.options import Strength
from acsr_ray.purification.purifier import Purifier
from acsr_ray.purification.unrolled import restore_unrolled
from acsr_ray.sparse.noise import noise_level
from acsr_ray.sparse.prox import project_atoms
from acsr_ray.sparse.tikhonov import tikhonov_split
from acsr_ray.sparse.unrolled import UnrolledConfig, UnrolledCsc, spread_atoms
from acsr_ray.training.feed import Batch
from acsr_ray.training.loop import AdamConfig, accuracy, predict
from acsr_ray.training.objectives import Objective
from acsr_ray.training.pairs import PairConfig, Recipe, attack_pairs, draw_pairs

EVALUATION_IMAGES = 500
"""Most images that are attacked for the closing metrics."""
LEVEL_IMAGES = 2000
"""Most images for the levels of noise and response, which need no attack."""
NOISE = "median_noise_level"
"""Closing metric: what strength `auto` is to take for the noise of a clean image."""
RESPONSE = "usual_response"
"""Closing metric: response of the network to its own output that few clean images exceed."""
USUAL = 0.95
"""Share of clean images whose response is at most the usual one."""
BEYOND = "attacked_beyond_usual"
"""Closing metric: share of attacked images whose response is more than that."""
TELLING = 0.8
"""Share from which on the response is what strength `auto` goes by. It is of attacks at the largest budget on
the surrogates, which are the easiest to tell."""
BY_RESPONSE = {"slope": 8.0, "low": 0.9, "high": 1.6}
"""Strength `auto` of a trained network, beside its reference. Chosen, with `USUAL`, on validation images of
CIFAR-10, for the best mean over attacks and targets at a loss of 1.5 points of clean accuracy: a higher bound
serves targets to which attacks of the surrogates transfer less, and costs others."""
MULTIPLIER_RATE = 2.0
"""How much faster than a weight the multiplier's parameter moves."""
MULTIPLIER_RANGE = (0.2, 5.0)
"""The multiplier starts at their geometric mean. A bound that cannot be met yet must not drown the rest."""


class SurrogateConfig(Described):
    """A classifier that attacks are made on; never the one to be defended."""

    location: str
    """See `acsr_ray.models.targets.load_target`."""
    digest: str
    """Of what it computes."""


class LossConfig(Described):
    """What a purifier is trained for."""

    pixel: float = Field(20.0, ge=0)
    """Weight of the mean absolute error against the original."""
    consistency: float = Field(1.0, ge=0)
    """Weight of KL(f(x) || f(T(x'))), f the surrogate that was attacked."""
    clean_drop: float = Field(0.005, ge=-1, le=1)
    """Most accuracy that the surrogates may lose on clean images; the multiplier grows until it holds."""


class ConstrainedPurifier(nn.Module):
    """The reconstruction and the multiplier of its constraint, which both are trained."""

    def __init__(self, reconstruction: UnrolledCsc) -> None:
        super().__init__()
        self.reconstruction = reconstruction
        self.dual = nn.Parameter(torch.zeros(()))

    def forward(self, lowpass: Tensor, highpass: Tensor, cluster: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return purified images and the multiplier."""
        return self.reconstruction(lowpass, highpass, cluster), self.multiplier()

    def multiplier(self) -> Tensor:
        """Return the weight of clean images, a scalar within `MULTIPLIER_RANGE`."""
        low, high = MULTIPLIER_RANGE
        exponent = math.log(high / low) * torch.sigmoid(MULTIPLIER_RATE * self.dual)
        return low * exponent.exp()


class PurifierTraining(Described):
    """See `acsr_ray.training.run.Training`."""

    bundle: str
    """Folder or name of the bundle whose dictionaries it starts from."""
    bundle_digest: str
    """Of that bundle."""
    surrogates: tuple[SurrogateConfig, ...]
    """Classifiers to attack."""
    image_size: int
    """Side in pixels of the training images."""
    network_config: UnrolledConfig
    """The network."""
    atoms: int
    """M: atoms of its first layer."""
    init: str
    """`dictionary`, `random` (unlearnt atoms, the control), or a bundle whose network to start from."""
    init_digest: str | None
    """Of that bundle."""
    pairs: PairConfig
    """Attacked images."""
    loss: LossConfig
    """What to minimise."""
    optimizer: AdamConfig
    """Schedule and optimiser."""
    seed: int
    """Fixes initialisation, shuffling, augmentation and attacks."""

    def build(self) -> nn.Module:
        """Return the network as it starts."""
        if self.init_digest is not None:
            return ConstrainedPurifier(restore_unrolled(load_bundle(self.init)))
        bundle = load_bundle(self.bundle)
        reconstruction = UnrolledCsc(
            starting_atoms(bundle, self),
            self.network_config,
            len(bundle.atoms),
            bundle.config.cbpdn.lmbda,
            # Its own, so that the deeper layers start alike whatever the atoms are.
            torch.Generator().manual_seed(self.seed),
        )
        return ConstrainedPurifier(reconstruction)

    def network(self, model: nn.Module) -> nn.Module:
        """Return the model."""
        return model

    def objective(self, model: nn.Module, network: nn.Module, units: Sequence[Unit]) -> Objective:
        """Return the loss on pairs."""
        device = next(model.parameters()).device
        return PurifierObjective(network, self, str(device))

    def closing_metrics(self, model: nn.Module, held_out: LabelledImages, device: str) -> dict[str, float]:
        """Return mean accuracies of the surrogates, bare and purified, and the levels of strength `auto`."""
        chosen = sample_rows(len(held_out), EVALUATION_IMAGES)
        pixels, labels = held_out.pixels[chosen], held_out.labels[chosen]
        purifier = Purifier(self.trained(model.state_dict()), device)
        many = held_out.pixels[sample_rows(len(held_out), LEVEL_IMAGES)]
        levels = predict(
            lambda images: noise_level(split_bands(images, purifier.config.tikhonov)[1]), many, device
        )
        responses = predict(purifier.response, many, device)
        usual = responses.quantile(USUAL).item()
        threat, beyond = ThreatModel("linf", self.pairs.linf), 0.0
        sums = dict.fromkeys(("clean", "attacked", "purified_clean", "purified_attacked"), 0.0)
        for entry in self.surrogates:
            surrogate = load_target(entry.location, device).model
            attacked = attack_pixels(surrogate, pixels, labels, threat, device)
            behind = nn.Sequential(purifier, surrogate)
            seen = predict(purifier.response, attacked, device) > usual
            beyond += seen.double().mean().item() / len(self.surrogates)
            for name, shown in (("clean", pixels), ("attacked", attacked)):
                sums[name] += accuracy(predict(surrogate, shown, device), labels)
                sums[f"purified_{name}"] += accuracy(predict(behind, shown, device), labels)
        shares = {f"surrogates_{name}": value / len(self.surrogates) for name, value in sums.items()}
        assert isinstance(model, ConstrainedPurifier)
        multiplier, noise = model.multiplier().item(), levels.median().item()
        own = {"multiplier": multiplier, NOISE: noise, RESPONSE: usual, BEYOND: beyond}
        return {"validation_images": len(labels), **own, **shares}

    def trained(
        self,
        weights: Mapping[str, Tensor],
        metrics: Mapping[str, float] | None = None,
        strength: Strength = 1.0,
    ) -> Bundle:
        """Return the bundle with this reconstruction, which becomes its default.

        Args:
            weights: state dict of what `build` returned.
            metrics: of `closing_metrics`, which say where strength `auto` is to be 1; without them, or where
                images have no noise, that stays as it is.
            strength: at which the network is used by default.
        """
        bundle, found = load_bundle(self.bundle), metrics or {}
        update: dict[str, Any] = {"reconstruction": "unrolled", "unrolled": self.network_config}
        if found.get(NOISE):
            auto = bundle.config.auto_strength.model_copy(update={"reference": found[NOISE]})
            update["auto_strength"] = auto
        telling = found.get(BEYOND, 0.0) >= TELLING
        auto_by_response = AutoStrength(reference=found[RESPONSE], **BY_RESPONSE) if telling else None
        update["auto_by_response"] = auto_by_response
        update["unrolled_strength"] = strength
        prefix = "reconstruction."
        own = {n.removeprefix(prefix): t.cpu() for n, t in weights.items() if n.startswith(prefix)}
        return replace(bundle, config=bundle.config.model_copy(update=update), reconstruction=own)


class PurifierObjective:
    """Loss of a batch of pairs.

    Args:
        network: bands and clusters to purified images and multiplier.
        training: settings.
        device: where everything is.
    """

    def __init__(self, network: nn.Module, training: PurifierTraining, device: str) -> None:
        self.network, self.training = network, training
        self.surrogates = [load_target(entry.location, device).model for entry in training.surrogates]
        bundle = load_bundle(training.bundle)
        self.tikhonov = bundle.config.tikhonov
        self.purifier: Purifier | None = None
        if training.network_config.sharing != "global":
            self.purifier = Purifier(bundle.with_reconstruction("cbpdn"), device)

    def extras(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the attack of the batch, and each image's strength and noise."""
        drawn = draw_pairs(batch, self.training.pairs, len(self.surrogates), self.training.seed)
        return drawn.recipe.tensor(len(batch.labels)), drawn.share, drawn.noise

    def loss(self, images: Tensor, labels: Tensor, recipes: Tensor, share: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of some rows."""
        config = self.training.loss
        recipe = Recipe.from_tensor(recipes)
        surrogate = self.surrogates[recipe.surrogate]
        attacked = attack_pairs(surrogate, images, labels, recipe, share, noise, self.training.pairs)
        lowpass, highpass = tikhonov_split(attacked, self.tikhonov)
        purified, multiplier = self.network(lowpass, highpass, self._clusters(attacked))
        with torch.no_grad():
            wanted = F.log_softmax(surrogate(images), 1)
        logits = surrogate(purified)
        divergence = F.kl_div(F.log_softmax(logits, 1), wanted, reduction="none", log_target=True).sum(1)
        pixel = (purified - images).abs().mean((1, 2, 3))
        loss = (config.pixel * pixel + config.consistency * divergence).mean()
        # Divided by the expected, not by the actual number of clean rows: the loss is then a mean over rows,
        # the same however a batch is cut.
        clean = (share == 0) / max(self.training.pairs.clean, 1 / self.training.optimizer.batch_size)
        drop = (wanted.argmax(1) == labels).float() - (logits.argmax(1) == labels).float()
        excess = (clean * (drop - config.clean_drop)).mean()
        # Descent for the weights, ascent for the multiplier.
        return loss + multiplier.detach() * (clean * divergence).mean() - multiplier * excess.detach()

    def _clusters(self, images: Tensor) -> Tensor | None:
        if self.purifier is None:
            return None
        with torch.no_grad():
            return self.purifier.select(self.purifier.latents(images)).index


def starting_atoms(bundle: Bundle, training: PurifierTraining) -> Tensor:
    """Return the atoms (F, M, 3, s, s) that a network starts from.

    One set for each cluster where filters are its own, else atoms of all clusters that differ most.

    Raises:
        ValueError: more atoms than there are to choose from.
    """
    if training.network_config.sharing == "filters":
        atoms = torch.stack([spread_atoms(own[None], training.atoms) for own in bundle.atoms])
    else:
        atoms = spread_atoms(bundle.atoms, training.atoms)[None]
    if training.init == "dictionary":
        return atoms
    drawn = torch.randn(atoms.shape[1:], generator=torch.Generator().manual_seed(training.seed))
    return project_atoms(drawn).expand(len(atoms), -1, -1, -1, -1).clone()
