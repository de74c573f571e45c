"""Two classifiers behind one purifier at several strengths: who got what right, and what is made of it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from acsr_ray.artifacts import ArtifactError
from acsr_ray.attacks.pgd import attack_pixels
from acsr_ray.attacks.threat import ThreatModel
from acsr_ray.corpus.images import to_pixels, to_unit_range
from acsr_ray.evaluation.finetuning import (
    GrayBoxAttack,
    Outcomes,
    Pair,
    borne_line,
    compare_classifiers,
    finetuning_markdown,
    finetuning_tables,
    purifier_at,
    strongest_borne,
)
from acsr_ray.purification.options import PurifyOptions, Strength
from acsr_ray.purification.purifier import Purifier
from acsr_ray.training.loop import predict

THREAT = ThreatModel("linf", 24 / 255)
PAIRS = ("clean", "attacked", "attacked_itself")


class Dim(nn.Module):
    """A purifier that takes light away, and a third of a level more, which 8 bits do not hold."""

    def __init__(self, strength: float, device: str) -> None:
        super().__init__()
        self.strength = strength
        assert device == "cpu"

    def forward(self, images: Tensor) -> Tensor:
        return (images * (1 - self.strength) + 1 / 765).clamp(0, 1)


@pytest.fixture(scope="module")
def models(digits):
    """The digits' network, and one that sees images in a mirror: as good on mirrored digits only."""
    return digits.model, nn.Sequential(Mirror(), digits.model)


class Mirror(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flip(-1)


@pytest.fixture(scope="module")
def outcomes(digits, models):
    pixels, labels = to_pixels(digits.images.numpy()), digits.labels.numpy()
    return compare_classifiers(
        *models, pixels, labels, purifier=Dim, strengths=(0.5, 0.25), threat=THREAT, device="cpu"
    )


def test_every_outcome_is_that_of_its_classifier_attack_and_strength(digits, models, outcomes):
    before, after = models
    pixels, labels = to_pixels(digits.images.numpy()), digits.labels.numpy()
    on_before, on_after = (attack_pixels(model, pixels, labels, THREAT) for model in models)
    assert [found.strength for found in outcomes] == [None, 0.5, 0.25]
    for found in outcomes:
        for name, old, new in (
            ("clean", pixels, pixels),
            ("attacked", on_before, on_before),
            ("attacked_itself", on_before, on_after),
        ):
            pair = getattr(found, name)
            for model, images, right in ((before, old, pair.before), (after, new, pair.after)):
                seen = images
                if found.strength is not None:
                    seen = to_pixels(
                        Dim(found.strength, "cpu")(torch.from_numpy(to_unit_range(images))).numpy()
                    )
                assert (right == (predict(model, seen).argmax(1).numpy() == labels)).all(), (name, found)
    bare = outcomes[0]
    # The cases differ, so that a swap would show.
    assert bare.clean.before.mean() > 0.9 > bare.clean.after.mean()
    assert (bare.attacked.after != bare.attacked_itself.after).any()
    assert bare.attacked.before.mean() < bare.clean.before.mean() - 0.3


def test_what_is_seen_has_8_bits(digits, models):
    seen = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return digits.model(images)

    pixels, labels = to_pixels(digits.images[:4].numpy()), digits.labels[:4].numpy()
    options = {"purifier": Dim, "strengths": (0.3,), "threat": THREAT, "device": "cpu"}
    compare_classifiers(Spy(), digits.model, pixels, labels, **options)
    final = seen[-1]
    assert torch.allclose(final * 255, (final * 255).round(), atol=1e-4)


def right(count: int, of: int = 200) -> np.ndarray:
    return np.arange(of) < count


def outcome(strength: Strength | None, before: int, after: int) -> Outcomes:
    pair = Pair(right(before), right(after))
    return Outcomes(strength, pair, pair, pair)


@pytest.mark.parametrize(
    ("bare", "found", "borne"),
    [
        # 190 of 200 bare: 188 is one point less, 187 is more.
        ((190, 190), [(1.0, 188, 190), (2.0, 187, 188)], (1.0, 2.0)),
        ((190, 190), [(2.0, 187, 188), (1.0, 188, 190)], (1.0, 2.0)),
        ((190, 190), [(1.0, 187, 187)], (None, None)),
        # Worse on bare images after the fine-tuning is no excuse.
        ((190, 150), [(1.0, 190, 150)], (1.0, None)),
        # Better behind the stronger one than behind the weaker.
        ((190, 190), [(1.0, 100, 190), (2.0, 189, 100)], (2.0, 1.0)),
        # Nothing is stronger or weaker than `auto`.
        ((190, 190), [("auto", 190, 190), (0.5, 188, 187)], (0.5, None)),
    ],
)
def test_the_strongest_that_costs_at_most_a_point_is_borne(bare, found, borne):
    outcomes = [outcome(None, *bare), *(outcome(*entry) for entry in found)]
    assert strongest_borne(outcomes) == dict(zip(("before", "after"), borne, strict=True))
    words = ["none of those measured" if s is None else f"strength {s:g}" for s in borne]
    line = borne_line(outcomes)
    assert line.endswith(f"(95.0 %): {words[0]} before, {words[1]} after.")


def test_tables_hold_both_accuracies_and_the_paired_difference():
    pair, other = Pair(right(100), right(150)), Pair(right(50), right(40))
    itself = Pair(other.before, right(20))
    found = [Outcomes(None, pair, other, itself), Outcomes("auto", other, pair, itself)]
    clean, attacked = finetuning_tables(found, "mine (cbpdn)", GrayBoxAttack())
    assert [row[0] for row in clean.rows] == ["none", "strength auto"]
    start = [[cell.split(" [")[0] for cell in row[1:]] for row in clean.rows]
    assert start == [["50.0", "75.0", "+25.0"], ["25.0", "20.0", "-5.0"]]
    start = [[cell.split(" [")[0] for cell in row[1:]] for row in attacked.rows]
    assert start[0] == ["25.0", "20.0", "-5.0", "10.0", "-15.0"]
    assert "linf 0.03137" in attacked.caption
    assert "200 images" in clean.caption
    text = finetuning_markdown(found, "mine (cbpdn)", GrayBoxAttack(), {"started from": "a|b"})
    assert text.index("Strongest purifier") < text.index(r"- started from: a\|b") < text.index("### Clean")


def test_the_description_is_json_of_the_same_numbers():
    described = outcome(2.0, 100, 150).describe()
    assert described["strength"] == 2.0
    assert set(described) == {"strength", *PAIRS}
    share = described["clean"]["after"]
    assert (share["value"], share["count"]) == (0.75, 200)
    assert share["low"] < 0.75 < share["high"]
    assert described["clean"]["difference"]["value"] == pytest.approx(0.25)


@pytest.fixture(scope="module")
def images(smooth_pixels):
    return torch.from_numpy(to_unit_range(smooth_pixels(3, 16, 16, 4)))


@pytest.mark.parametrize("options", [PurifyOptions(), PurifyOptions(top_k=2, strength=7.0)])
def test_the_purifier_keeps_its_options_but_for_the_strength(tiny_bundle, images, options):
    for strength in (1.0, 3.0):
        wanted = PurifyOptions(top_k=options.top_k, strength=strength)
        found = purifier_at(str(tiny_bundle), options, strength)(images)
        assert torch.equal(found, Purifier.load(tiny_bundle, options=wanted)(images))
    assert not torch.equal(found, purifier_at(str(tiny_bundle), options, 1.0)(images))


def test_a_reconstruction_that_was_not_trained_is_refused(tiny_bundle):
    with pytest.raises(ArtifactError, match="has no unrolled reconstruction"):
        purifier_at(str(tiny_bundle), PurifyOptions(reconstruction="unrolled"), 1.0)
