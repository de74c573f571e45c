"""Grids that ask what the trained reconstruction buys, and what its parts are worth."""

from collections.abc import Iterator, Sequence
from typing import Any

from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.threat import Norm
from acsr_ray.evaluation.defenses import DefenseConfig
from acsr_ray.evaluation.grid import Grid, SweepAttack, SweepDefense, SweepTarget
from acsr_ray.evaluation.ingredients import (
    calibrated_attacks,
    coded,
    evaluation_data,
    ladder,
    no_defense,
    noise,
    single,
    size_caption,
    sweep_target,
)
from acsr_ray.evaluation.purifier_recipes import ABLATIONS, REFERENCE
from acsr_ray.evaluation.recipes import Place
from acsr_ray.purification.options import Strength

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
        data=(evaluation_data(data, place, 2000, 5000),),
        targets=tuple(sweep_target(place, data, name, title) for name, title in JUDGES.items()),
        attacks=(*weak_and_strong(), apgd(8)),
        defenses=(
            no_defense(),
            *unrolled(place.bundle_of(data), (0.9, 1.0, "auto")),
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
        data=(evaluation_data(data, place, 1900, 1000),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"),),
        attacks=(*weak_and_strong(), apgd(8)),
        defenses=(no_defense(), *unrolled(place.bundle_of(data), (1.4,)), *cheap()),
        chunk=50,
        clean_loss=CLEAN_LOSS,
        choose=True,
        reference=UNROLLED,
    )


def purifier_filter(place: Place) -> Grid:
    """Trained reconstructions of the packaged bundles on a content filter whose images no training saw."""
    data = "moderation5"
    mine: dict[str, tuple[str, Strength]] = {
        f"{UNROLLED} 1.4, ImageNet-10": (place.bundle_of("imagenet10-64"), 1.4),
        f"{UNROLLED} auto, CIFAR-10": (place.bundle_of("cifar10"), "auto"),
    }
    return Grid(
        title="Trained reconstructions out of their domain: a five-class content filter",
        caption=size_caption(place, data, cw=False)
        + "The attacker sees the bare target only. Neither the filter's images nor its classes were in the "
        "training of the purifiers; both architectures were among their surrogates, with other weights. "
        "BIM of 20 steps, CW with c = 1 and 50 steps as it comes.",
        layout="filter",
        data=(evaluation_data(data, place, 900, 900),),
        targets=(
            sweep_target(place, data, "alexnet", "AlexNet"),
            sweep_target(place, data, "resnet50", "ResNet-50 (adversarially trained)", "-adv"),
        ),
        attacks=tuple(weak_and_strong()),
        defenses=(
            no_defense(),
            *(
                SweepDefense(
                    name=name,
                    config=DefenseConfig(
                        name="acsr", artifact=bundle, reconstruction="unrolled", strength=strength
                    ),
                )
                for name, (bundle, strength) in mine.items()
            ),
            *ladder("JPEG", "jpeg", "quality", (85, 75, 60)),
        ),
        chunk=50,
        reference=next(iter(mine)),
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
            *unrolled(place.bundle_of(data), ("auto", 1.0)),
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
        + "Every network had the same images and steps, few of both, and one setting differs from the "
        "reference; `another-seed` differs in the seed only, and shows what of a difference is chance of the "
        "training, which the p-values, of the choice of images, do not count. The attacker sees the bare "
        "target only.",
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
                        strength=1.0,
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
    """Return the packaged bundle's network, and its CBPDN: strength by noise, several clusters."""
    settings: dict[str, dict[str, Any]] = {
        "packaged": {"reconstruction": "unrolled", "strength": 1.0},
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
    # Every step of a white-box attack is two passes of the network and their gradients.
    images, few, steps, queries = (200, 20, 20, 300) if place.small else (1000, 50, 40, 500)
    mine, auto, jpeg = f"{UNROLLED} 1", f"{UNROLLED} auto", "JPEG 75"
    return Grid(
        title="Attacks that know the trained reconstruction, CIFAR-10",
        caption=size_caption(place, data, cw=False)
        + f"PGD of {steps} steps, Square of {queries} queries. White-box follows the gradients of purifier "
        "and target; transfer those of a purifier trained on fewer images from other weights (`random-init` "
        "of the ablations; a stronger substitute would transfer more), and the target; low-frequency may add "
        "what the split's low band passes, at the whole budget. Where strength `auto` is at a bound the "
        "attacker gets no gradient of it. The adversarially trained target is a "
        "WideResNet-16-1 (PGD, l2 0.3), an architecture that is among the surrogates.",
        layout="adaptive",
        data=(evaluation_data(data, place, images),),
        targets=(
            sweep_target(place, data, "vgg16", "VGG-16"),
            SweepTarget(name="WRN-16-1, PGD-AT", location=str(place.encoder("pgdat")), data=(data,)),
        ),
        attacks=tuple(_by_knowledge((mine, auto, jpeg), few, steps, queries)),
        defenses=(
            no_defense(),
            *unrolled(bundle, (1.0, "auto")),
            SweepDefense(
                name="another purifier",
                config=DefenseConfig(name="acsr", artifact=other, reconstruction="unrolled", strength=1.0),
            ),
            *coded("acsr", bundle, "ACSR CBPDN", (0.1,), reconstruction="cbpdn"),
            single(jpeg, "jpeg", quality=75),
        ),
        chunk=50,
    )


def _by_knowledge(names: tuple[str, str, str], few: int, steps: int, queries: int) -> Iterator[SweepAttack]:
    mine, auto, jpeg = names
    budgets: dict[str, tuple[Norm, float]] = {"l2 0.5": ("l2", 0.5), "linf 8/255": ("linf", 8 / 255)}
    seen: dict[str, tuple[str, tuple[str, ...] | None]] = {
        "gray-box": ("gray_box", None),
        "transfer from another purifier": ("transfer_purifier", None),
        "BPDA": ("bpda", (mine, jpeg)),
        "low-frequency": ("low_frequency", ("none", mine)),
        "white-box": ("white_box", ("none", mine, auto)),
    }
    for budget, (norm, epsilon) in budgets.items():
        attack = AttackConfig(name="pgd", norm=norm, epsilon=epsilon, steps=steps)
        for title, (knowledge, defenses) in seen.items():
            yield SweepAttack.model_validate(
                {
                    "name": f"{title}, {budget}",
                    "attack": attack,
                    "knowledge": knowledge,
                    "through": "another purifier" if knowledge == "transfer_purifier" else None,
                    "defenses": defenses,
                    "block": budget,
                }
            )
        # An attack without gradients must not do better than one that follows them.
        yield SweepAttack(
            name=f"Square (first {few} images), {budget}",
            attack=AttackConfig(name="square", norm=norm, epsilon=epsilon, queries=queries),
            knowledge="white_box",
            images=few,
            defenses=("none", mine),
            block=budget,
        )
    # Budgets that nothing withstands: the check that gradients are followed.
    for name, norm, epsilon in (("l2 4", "l2", 4.0), ("linf 64/255", "linf", 64 / 255)):
        yield SweepAttack.model_validate(
            {
                "name": f"white-box, {name} (first {few} images)",
                "attack": AttackConfig.model_validate(
                    {"name": "pgd", "norm": norm, "epsilon": epsilon, "steps": steps}
                ),
                "knowledge": "white_box",
                "images": few,
                "defenses": ("none", mine, auto),
                "block": "Sanity",
            }
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
    """Return every cheap filter at several strengths, close enough together to meet a clean accuracy."""
    return [
        *ladder("JPEG", "jpeg", "quality", (90, 85, 80, 75, 70, 60, 40)),
        *ladder("JPEG 4:4:4", "jpeg", "quality", (80, 60), subsampling="4:4:4"),
        *ladder("Gaussian", "gaussian", "sigma", (0.3, 0.4, 0.5)),
        single("median 2", "median", size=2),
        *ladder("TVM", "tvm", "weight", (0.005, 0.01, 0.02)),
    ]


def unrolled(bundle: str, strengths: Sequence[Strength]) -> list[SweepDefense]:
    """Return the trained reconstruction of a bundle at several strengths, as one family."""
    return [
        SweepDefense(
            name=f"{UNROLLED} {strength if strength == 'auto' else format(strength, 'g')}",
            config=DefenseConfig(name="acsr", artifact=bundle, reconstruction="unrolled", strength=strength),
            family=UNROLLED,
        )
        for strength in strengths
    ]
