"""A classifier before and after it was fine-tuned on purified images: how strong a purifier does it bear?

Both get the same images, behind no purifier and behind one at several strengths: clean ones, ones that were
attacked on the classifier as it was before (an attacker who kept the old one), and ones that were attacked on
each of the two itself (gray-box: an attacker who knows the classifier in use, but of no purifier). What a
classifier sees has 8 bits, as a stored corpus has.

Shapes: N images, S pixels a side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from acsr_ray.attacks.pgd import attack_pixels
from acsr_ray.attacks.threat import Norm, ThreatModel
from acsr_ray.config import Described
from acsr_ray.corpus.images import Pixels, to_pixels
from acsr_ray.evaluation.intervals import Share, wilson_share
from acsr_ray.evaluation.statistics import paired_difference
from acsr_ray.evaluation.tables import Table, escape_markdown, to_markdown
from acsr_ray.purification.options import PurifyOptions, Strength
from acsr_ray.purification.purifier import Purifier
from acsr_ray.training.loop import predict

BORNE_LOSS = 0.01
"""A purifier is borne when purified clean images cost at most so much accuracy."""


class GrayBoxAttack(Described):
    """PGD of 10 steps on the bare classifier, without random start, rounded to 8 bits."""

    norm: Norm = "linf"
    """`linf`, `l2` or `relative_l2`."""
    epsilon: float = Field(8 / 255, gt=0)
    """Radius on the [0, 1] pixel scale; for `relative_l2` a share of the image's norm."""

    @property
    def threat(self) -> ThreatModel:
        """The set that adversarial images stay in, up to rounding."""
        return ThreatModel(self.norm, self.epsilon)

    def __str__(self) -> str:
        """Return what a table's caption says of it."""
        return f"PGD of 10 steps, {self.norm} {self.epsilon:.4g}"


@dataclass(frozen=True)
class Pair:
    """Which images the classifier got right before and after the fine-tuning, (N,) bool each."""

    before: NDArray[np.bool_]
    after: NDArray[np.bool_]

    @property
    def shares(self) -> tuple[Share, Share]:
        """Both accuracies with Wilson 95 % intervals."""
        before, after = (wilson_share(int(right.sum()), len(right)) for right in (self.before, self.after))
        return before, after

    def cells(self) -> tuple[str, str, str]:
        """Return both accuracies and the paired difference after - before, for a table."""
        before, after = self.shares
        return str(before), str(after), str(paired_difference(self.after, self.before))

    def describe(self) -> dict[str, Any]:
        """Return the same as JSON values, accuracies in [0, 1]."""
        before, after = self.shares
        difference = paired_difference(self.after, self.before)
        return {"before": asdict(before), "after": asdict(after), "difference": asdict(difference)}


@dataclass(frozen=True)
class Outcomes:
    """What became of the images behind one purifier."""

    strength: Strength | None
    """Of the purifier; None: no purifier."""
    clean: Pair
    attacked: Pair
    """Attacked on the classifier before the fine-tuning."""
    attacked_itself: Pair
    """Attacked on each classifier itself."""

    def describe(self) -> dict[str, Any]:
        """Return the accuracies, intervals and differences as JSON values."""
        pairs = {name: getattr(self, name).describe() for name in ("clean", "attacked", "attacked_itself")}
        return {"strength": self.strength, **pairs}


def purifier_at(bundle: str, options: PurifyOptions, strength: Strength, device: str = "cpu") -> Purifier:
    """Load a bundle's purifier at another strength than its options say.

    Raises:
        ArtifactError: no such bundle, or no such reconstruction in it.
    """
    return Purifier.load(bundle, device, options.model_copy(update={"strength": strength}))


def compare_classifiers(
    before: nn.Module,
    after: nn.Module,
    pixels: Pixels,
    labels: NDArray[np.int64],
    *,
    purifier: Callable[[Strength, str], nn.Module],
    strengths: Sequence[Strength],
    threat: ThreatModel,
    device: str,
) -> tuple[Outcomes, ...]:
    """Classify clean and attacked images bare and behind the purifier at every strength.

    Args:
        before: images to logits, in evaluation mode.
        after: the same, fine-tuned.
        pixels: (N, S, S, 3) uint8, clean.
        labels: (N,).
        purifier: (strength, device) to a network from images to purified images.
        strengths: at which to measure.
        threat: of the attacks.
        device: where to compute; both classifiers are moved there.

    Returns:
        Outcomes without a purifier, then those of each strength in order.
    """
    before, after = before.to(device), after.to(device)
    attacked = attack_pixels(before, pixels, labels, threat, device)
    anew = attack_pixels(after, pixels, labels, threat, device)
    found = []
    for strength in (None, *strengths):
        purify = None if strength is None else purifier(strength, device)
        shown = [_stored(purify, images, device) for images in (pixels, attacked, anew)]
        old, new = ([_right(model, seen, labels, device) for seen in shown] for model in (before, after))
        pairs = Pair(old[0], new[0]), Pair(old[1], new[1]), Pair(old[1], new[2])
        found.append(Outcomes(strength, *pairs))
    return tuple(found)


def _stored(purify: nn.Module | None, pixels: Pixels, device: str) -> Pixels:
    return pixels if purify is None else to_pixels(predict(purify, pixels, device).numpy())


def _right(model: nn.Module, pixels: Pixels, labels: NDArray[np.int64], device: str) -> NDArray[np.bool_]:
    right: NDArray[np.bool_] = predict(model, pixels, device).argmax(1).numpy() == labels
    return right


def strongest_borne(outcomes: Sequence[Outcomes]) -> dict[str, float | None]:
    """Return the largest strength that the classifier bears, `before` and `after`; None where it bears none.

    What counts is the accuracy on purified clean images, against that on bare ones before the fine-tuning:
    a classifier that the fine-tuning made worse on bare images bears no more for that. `auto`, which is not
    stronger or weaker than another, is left out.
    """
    bare = next(found for found in outcomes if found.strength is None).clean.shares[0].value
    borne: dict[str, float | None] = {}
    for position, name in enumerate(("before", "after")):
        strengths = [
            found.strength
            for found in outcomes
            # The slack is for shares that are equal but for rounding.
            if isinstance(found.strength, float)
            and bare - found.clean.shares[position].value <= BORNE_LOSS + 1e-9
        ]
        borne[name] = max(strengths, default=None)
    return borne


def borne_line(outcomes: Sequence[Outcomes]) -> str:
    """Return the sentence that says how much stronger a purifier is borne after the fine-tuning."""
    words = {
        name: "none of those measured" if strength is None else _shown(strength)
        for name, strength in strongest_borne(outcomes).items()
    }
    bare = next(found for found in outcomes if found.strength is None).clean.shares[0].value
    return (
        f"Strongest purifier with at most {100 * BORNE_LOSS:g} point less accuracy on clean images than bare "
        f"before fine-tuning ({100 * bare:.1f} %): {words['before']} before, {words['after']} after."
    )


def finetuning_tables(
    outcomes: Sequence[Outcomes], purifier: str, attack: GrayBoxAttack
) -> tuple[Table, Table]:
    """Return the table of clean and that of attacked images, a row for none and for each strength.

    Args:
        outcomes: as `compare_classifiers` returned them.
        purifier: what it is called.
        attack: what the attacked images are.
    """
    names = ["none" if found.strength is None else _shown(found.strength) for found in outcomes]
    note = f"{len(outcomes[0].clean.before)} images; percent [95 %]; purifier {purifier}."
    clean = tuple((name, *found.clean.cells()) for name, found in zip(names, outcomes, strict=True))
    # An attack on the old classifier is what it met before in either case, so that column stands once.
    attacked = tuple(
        (name, *found.attacked.cells(), *found.attacked_itself.cells()[1:])
        for name, found in zip(names, outcomes, strict=True)
    )
    changes = ("before", "after", "after - before")
    return (
        Table("Clean images", note, ("purifier", *changes), clean),
        Table(
            "Attacked images",
            f"{note} {attack}, rounded to 8 bits, on the classifier before fine-tuning; in the last two "
            "columns the fine-tuned classifier meets an attack on itself.",
            ("purifier", *changes, "after, attacked itself", "that minus before"),
            attacked,
        ),
    )


def finetuning_markdown(
    outcomes: Sequence[Outcomes], purifier: str, attack: GrayBoxAttack, facts: Mapping[str, object]
) -> str:
    """Return the report: the answer, where the classifier is from, and both tables.

    Args:
        outcomes: as `compare_classifiers` returned them.
        purifier: what it is called.
        attack: what the attacked images are.
        facts: shown below the answer.
    """
    listed = [f"- {escape_markdown(f'{name}: {value}')}" for name, value in facts.items()]
    tables = [to_markdown(table) for table in finetuning_tables(outcomes, purifier, attack)]
    return "\n".join(
        [
            "# Fine-tuning on purified images",
            "",
            escape_markdown(borne_line(outcomes)),
            "",
            *listed,
            "",
            *tables,
        ]
    )


def _shown(strength: Strength) -> str:
    return f"strength {strength}" if isinstance(strength, str) else f"strength {strength:g}"
