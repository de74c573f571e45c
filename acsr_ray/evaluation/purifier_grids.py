"""Grids that ask what the trained reconstruction buys, and what its parts are worth."""

from collections.abc import Iterator, Sequence
from typing import Any

from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.evaluation.defenses import DefenseConfig
from acsr_ray.evaluation.grid import Grid, SweepAttack, SweepDefense, SweepTarget
from acsr_ray.evaluation.ingredients import (
    calibrated_attacks,
    coded,
    evaluation_data,
    ladder,
    no_defense,
    noise,
    size_caption,
    sweep_target,
)
from acsr_ray.evaluation.purifier_recipes import ABLATIONS, REFERENCE
from acsr_ray.evaluation.recipes import Place

UNROLLED = "ACSR unrolled"
JUDGES = {"vgg16": "VGG-16", "resnet9": "ResNet-9", "googlenet": "GoogLeNet"}
"""Targets whose architectures no surrogate of the packaged bundles has."""
CLEAN_LOSS = (0.015, 0.03, 0.06)


def purifier(place: Place) -> Grid:
    """The trained reconstruction against cheap defences at equal clean accuracy, three unseen targets."""
    data = "cifar10"
    return Grid(
        title="What the trained reconstruction buys, CIFAR-10",
        caption=size_caption(place, data, cw=False)
        + "The attacker sees the bare target only; the purifier was trained on attacks of other "
        "architectures. Budgets in relative l2; BIM of 20 steps, CW with c = 1 and 50 steps as it comes, "
        "without a second try where rounding undid it.",
        data=(evaluation_data(data, place, 2000, 1000),),
        targets=tuple(sweep_target(place, data, name, title) for name, title in JUDGES.items()),
        attacks=(*weak_and_strong(), apgd(8)),
        defenses=(
            no_defense(),
            *unrolled(place.bundle_of(data), (0.6, 0.8, 1.0, 1.4)),
            *coded("acsr", place.bundle_of(data), "ACSR CBPDN", (0.1,), reconstruction="cbpdn"),
            *cheap(),
        ),
        chunk=100,
        clean_loss=CLEAN_LOSS,
        choose=True,
        reference=UNROLLED,
    )


def purifier_imagenet(place: Place) -> Grid:
    """The trained reconstruction on photos of 64 pixels, one unseen target."""
    data = "imagenet10-64"
    return Grid(
        title="What the trained reconstruction buys, ImageNet-10 at 64 pixels",
        caption=size_caption(place, data, cw=False)
        + "The attacker sees the bare target only. BIM of 20 steps, CW with c = 1 and 50 steps as it comes.",
        data=(evaluation_data(data, place, 500, 500),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"),),
        attacks=(*weak_and_strong(), apgd(8)),
        defenses=(no_defense(), *unrolled(place.bundle_of(data), (0.6, 0.8, 1.0, 1.4)), *cheap()),
        chunk=50,
        clean_loss=CLEAN_LOSS,
        choose=True,
        reference=UNROLLED,
    )


def purifier_calibrated(place: Place) -> Grid:
    """The trained reconstruction at the budgets that give the paper's bare accuracies (B0)."""
    data = "cifar10"
    attacks = calibrated_attacks(place)
    if place.small:
        # Two rungs in place of five, as in the grid `graybox`.
        rungs = {"strengths": ({"kappa": 2.0}, {"kappa": 8.0})}
        attacks[-1] = attacks[-1].model_copy(update={"attack": attacks[-1].attack.model_copy(update=rungs)})
    return Grid(
        title="The trained reconstruction at calibrated budgets, CIFAR-10",
        caption=size_caption(place, data) + "The attacker sees the bare target only. ",
        data=(evaluation_data(data, place, 2000, 500),),
        targets=tuple(
            sweep_target(place, data, name, title) for name, title in JUDGES.items() if name != "googlenet"
        ),
        attacks=(
            *attacks,
            noise("relative_l2", 0.04).model_copy(update={"images": 500, "block": "Noise"}),
        ),
        defenses=(
            no_defense(),
            *unrolled(place.bundle_of(data), (1.0, 2.0)),
            *ladder("JPEG", "jpeg", "quality", (75, 50)),
        ),
        chunk=100,
    )


def ablations(place: Place) -> Grid:
    """What each part of the trained reconstruction is worth: one setting changed at a time."""
    data = "cifar10"
    return Grid(
        title="Ablations of the trained reconstruction, CIFAR-10",
        caption=size_caption(place, data, cw=False)
        + "Every network had the same images, steps and seed, few of each; one setting differs from the "
        "reference. The attacker sees the bare target only.",
        data=(evaluation_data(data, place, 1000),),
        targets=tuple(
            sweep_target(place, data, name, title) for name, title in JUDGES.items() if name != "googlenet"
        ),
        attacks=tuple(weak_and_strong()),
        defenses=(
            no_defense(),
            *(
                SweepDefense(
                    name=name,
                    config=DefenseConfig(
                        name="acsr",
                        artifact=str(place.reconstruction(name)),
                        reconstruction="unrolled",
                    ),
                )
                for name in ABLATIONS
            ),
            *_decisions(place.bundle_of(data)),
        ),
        chunk=100,
        reference=REFERENCE,
    )


def _decisions(bundle: str) -> list[SweepDefense]:
    """Return the packaged bundle's reconstructions with strength by noise, and with several clusters."""
    settings: dict[str, dict[str, Any]] = {
        "packaged": {"reconstruction": "unrolled"},
        "packaged, auto": {"reconstruction": "unrolled", "strength": "auto"},
        "CBPDN": {"reconstruction": "cbpdn"},
        "CBPDN, auto": {"reconstruction": "cbpdn", "strength": "auto"},
        "CBPDN, 3 clusters": {"reconstruction": "cbpdn", "top_k": 3},
    }
    return [
        SweepDefense(
            name=name, config=DefenseConfig.model_validate({"name": "acsr", "artifact": bundle, **setting})
        )
        for name, setting in settings.items()
    ]


def purifier_adaptive(place: Place) -> Grid:
    """Attackers who know the trained reconstruction, for a plain and an adversarially trained target."""
    data = "cifar10"
    bundle, other = place.bundle_of(data), str(place.reconstruction("random-init"))
    images = 200 if place.small else 1000
    mine = f"{UNROLLED} 1"
    return Grid(
        title="Attacks that know the trained reconstruction, CIFAR-10",
        caption=size_caption(place, data, cw=False)
        + "PGD of 40 steps. White-box follows the gradients of purifier and target; transfer those of a "
        "purifier trained from other weights, and the target; low-frequency may add what the split's low "
        "band passes. The adversarially trained target is a WideResNet-16-1 (PGD, l2 0.3).",
        layout="adaptive",
        data=(evaluation_data(data, place, images),),
        targets=(
            sweep_target(place, data, "vgg16", "VGG-16"),
            SweepTarget(name="WRN-16-1, PGD-AT", location=str(place.encoder("pgdat")), data=(data,)),
        ),
        attacks=tuple(_by_knowledge(mine)),
        defenses=(
            no_defense(),
            *unrolled(bundle, (1.0,)),
            SweepDefense(
                name="another purifier",
                config=DefenseConfig(name="acsr", artifact=other, reconstruction="unrolled"),
            ),
            *coded("acsr", bundle, "ACSR CBPDN", (0.1,), reconstruction="cbpdn"),
            *ladder("JPEG", "jpeg", "quality", (75,)),
        ),
        chunk=50,
    )


def _by_knowledge(mine: str) -> Iterator[SweepAttack]:
    budgets = {
        "l2 0.5": AttackConfig(name="pgd", norm="l2", epsilon=0.5, steps=40),
        "linf 8/255": AttackConfig(name="pgd", norm="linf", epsilon=8 / 255, steps=40),
    }
    for budget, attack in budgets.items():
        for title, knowledge in (
            ("gray-box", "gray_box"),
            ("transfer from another purifier", "transfer_purifier"),
            ("BPDA", "bpda"),
            ("low-frequency", "low_frequency"),
            ("white-box", "white_box"),
        ):
            seeing = knowledge in ("bpda", "low_frequency", "white_box")
            yield SweepAttack.model_validate(
                {
                    "name": f"{title}, {budget}",
                    "attack": attack,
                    "knowledge": knowledge,
                    "through": "another purifier" if knowledge == "transfer_purifier" else None,
                    "defenses": ("none", mine)
                    if seeing and knowledge != "bpda"
                    else (mine,)
                    if seeing
                    else None,
                    "block": budget,
                }
            )
    # A budget that nothing withstands: the check that gradients are followed.
    yield SweepAttack(
        name="white-box, linf 64/255",
        attack=AttackConfig(name="pgd", norm="linf", epsilon=64 / 255, steps=40),
        knowledge="white_box",
        images=50,
        defenses=("none", mine),
        block="Sanity",
    )


def weak_and_strong() -> list[SweepAttack]:
    """Return the literal budgets at which defences are compared."""
    relative = {
        "FGSM .01": AttackConfig(name="fgsm", norm="relative_l2", epsilon=0.01),
        "BIM .01": AttackConfig(name="bim", norm="relative_l2", epsilon=0.01, steps=20),
        "BIM .04": AttackConfig(name="bim", norm="relative_l2", epsilon=0.04, steps=20),
        "CW": AttackConfig(name="cw", norm="l2", epsilon=10.0, steps=50, strengths=()),
    }
    return [
        SweepAttack(name=name, attack=attack, block="Literal budgets") for name, attack in relative.items()
    ]


def apgd(epsilon: int) -> SweepAttack:
    """Return the strong gray-box attack of a linf radius in 255ths."""
    attack = AttackConfig(name="apgd", norm="linf", epsilon=epsilon / 255, steps=100)
    return SweepAttack(name=f"APGD linf {epsilon}/255", attack=attack, block="B3: APGD-100")


def cheap() -> list[SweepDefense]:
    """Return every cheap filter at several strengths."""
    return [
        *ladder("JPEG", "jpeg", "quality", (90, 75, 60, 50, 40, 30)),
        *ladder("Gaussian", "gaussian", "sigma", (0.4, 0.5, 0.6)),
        *ladder("median", "median", "size", (2, 3)),
        *ladder("TVM", "tvm", "weight", (0.02, 0.05)),
    ]


def unrolled(bundle: str, strengths: Sequence[float]) -> list[SweepDefense]:
    """Return the trained reconstruction of a bundle at several strengths, as one family."""
    return [
        SweepDefense(
            name=f"{UNROLLED} {strength:g}",
            config=DefenseConfig(name="acsr", artifact=bundle, reconstruction="unrolled", strength=strength),
            family=UNROLLED,
        )
        for strength in strengths
    ]
