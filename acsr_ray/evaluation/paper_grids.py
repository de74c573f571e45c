"""The paper's tables and figures as grids (METHOD, section 8); `presets` says what small and full mean."""

from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.threat import Norm
from acsr_ray.evaluation.defenses import DefenseConfig
from acsr_ray.evaluation.encoder_recipes import BASELINE, BASELINE_TITLE, ENCODERS, schedule_of
from acsr_ray.evaluation.grid import Grid, SweepAttack, SweepDefense, SweepTarget
from acsr_ray.evaluation.ingredients import (
    acsr,
    calibrated_attacks,
    controls,
    evaluation_data,
    literal_attacks,
    no_defense,
    noise,
    single,
    size_caption,
    sweep_target,
)
from acsr_ray.evaluation.recipes import Place
from acsr_ray.purification.bundle import load_bundle

PRETRAINED = "Pretrained: starts from weights of ImageNet-10 at 64 pixels, else trained as from scratch."
F4_EPSILONS = (1, 2, 4, 8, 12, 16, 24, 32)


def table1(place: Place) -> Grid:
    """Robust encoders under white-box attacks."""
    plan = schedule_of(place.small)
    rows = {BASELINE: BASELINE_TITLE, **{name: recipe.title for name, recipe in ENCODERS.items()}}
    targets = [SweepTarget(name=title, location=str(place.encoder(name))) for name, title in rows.items()]
    budgets: tuple[tuple[str, Norm, float], ...] = (("l2 0.3", "l2", 0.3), ("linf 8/255", "linf", 8 / 255))
    steps = {"pgd": 20, "cw": 100, "bim": 20, "tpgd": 20, "apgd": 100}
    attacks = [
        SweepAttack(
            name=f"{name.upper()}-{count} {title}",
            attack=AttackConfig(name=name, norm=norm, epsilon=epsilon, steps=count),
            block=title,
        )
        for title, norm, epsilon in budgets
        for name, count in steps.items()
        # CW has no linf form.
        if (name, norm) != ("cw", "linf")
    ]
    return Grid(
        title="Table 1: robust encoders under white-box attacks, CIFAR-10",
        caption=f"{plan.architecture} trained for {plan.epochs} epochs from random weights (TRADES "
        f"{plan.trades_epochs}), {plan.tuning_epochs} more where the brackets name the start; l2 0.3, PGD of "
        f"{plan.attack_steps} steps inside. RST: alpha 0.1.",
        layout="targets",
        data=(evaluation_data("cifar10", place, 200),),
        targets=tuple(targets),
        attacks=tuple(attacks),
        defenses=(no_defense(),),
    )


def table2(place: Place) -> Grid:
    """One purifier for four targets on CIFAR-10."""
    titles = {"alexnet": "AlexNet", "vgg16": "VGG-16", "resnet50": "ResNet-50", "googlenet": "GoogLeNet"}
    return Grid(
        title="Table 2: one purifier for four targets, CIFAR-10",
        caption=size_caption(place, "cifar10") + "One f_rob and one bundle for all targets. " + PRETRAINED,
        layout="targets",
        data=(evaluation_data("cifar10", place, 200),),
        targets=(
            *(sweep_target(place, "cifar10", name, title) for name, title in titles.items()),
            _pretrained_vgg(place),
        ),
        attacks=(*calibrated_attacks(place), *literal_attacks(place), noise("relative_l2", 0.08)),
        defenses=(no_defense(), *acsr(place, "cifar10"), *controls(place, "cifar10")),
        chunk=50,
        reference="ACSR",
    )


def _pretrained_vgg(place: Place) -> SweepTarget:
    """Return the other side of the paper's transfer-learning ablation, on CIFAR-10."""
    return sweep_target(place, "cifar10", "vgg16", "VGG-16, pretrained", "-pre")


def table3(place: Place) -> Grid:
    """Defences on CIFAR-10."""
    data = "cifar10"
    return Grid(
        title="Table 3: defences on CIFAR-10, VGG-16",
        caption=size_caption(place, data) + PRETRAINED,
        data=(evaluation_data(data, place, 200),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"), _pretrained_vgg(place)),
        attacks=(*calibrated_attacks(place), *literal_attacks(place), noise("relative_l2", 0.08)),
        defenses=(
            no_defense(),
            *acsr(place, data),
            single("median 2", "median", size=2),
            single("TVM", "tvm", weight=0.03),
            single("MagNet", "magnet", artifact=str(place.defense(data, "magnet"))),
            single("PixelDefend", "pixel_defend", artifact=str(place.defense(data, "pixel-cnn"))),
            *controls(place, data),
        ),
        chunk=50,
        reference="ACSR",
    )


def table4(place: Place, size: int) -> Grid:
    """Defences on ImageNet-10 at 64 or 128 pixels."""
    data = f"imagenet10-{size}"
    images = 200 if size == 64 else 50
    return Grid(
        title=f"Table 4: defences on ImageNet-10 at {size} pixels, VGG-16",
        caption=size_caption(place, data) + "PixelDefend and MagNet left out." + _without_literal(place),
        data=(evaluation_data(data, place, images, 100),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"),),
        attacks=tuple(_paper_attacks(place)),
        defenses=(
            no_defense(),
            *acsr(place, data),
            single("TVM", "tvm", weight=0.03),
            single("quilting", "quilting", artifact=str(place.defense("imagenet10-64", "patch-bank"))),
            single("crop ensemble", "crop_ensemble", crops=30, crop=0.9),
            single("pixel deflection", "pixel_deflection", deflections=100),
            *controls(place, data),
        ),
        chunk=25,
        reference="ACSR",
    )


def _paper_attacks(place: Place) -> list[SweepAttack]:
    """Return the calibrated attacks, noise as large as any of them, and the literal ones if there is time."""
    literal = [] if place.small else literal_attacks(place)
    return [*calibrated_attacks(place), *literal, noise("relative_l2", 0.04 if place.small else 0.08)]


def _without_literal(place: Place) -> str:
    return " Literal budgets (B1) left out." if place.small else ""


def table5(place: Place) -> Grid:
    """A five-class content filter, purified with dictionaries from CIFAR-10."""
    data = "moderation5"
    return Grid(
        title="Table 5: a five-class content filter, dictionaries from CIFAR-10",
        caption=size_caption(place, data)
        + "Plain AlexNet, and ResNet-50 adversarially trained at linf 4/255 "
        + ("(single-step). " if place.small else "(10-step PGD). ")
        + "The bundle never saw these images."
        + _without_literal(place),
        layout="filter",
        data=(evaluation_data(data, place, 200, 100),),
        targets=(
            sweep_target(place, data, "alexnet", "AlexNet"),
            sweep_target(place, data, "resnet50", "ResNet-50 (adversarially trained)", "-adv"),
        ),
        attacks=tuple(_paper_attacks(place)),
        defenses=(no_defense(), *acsr(place, data), *controls(place, data)),
        chunk=25,
        reference="ACSR",
    )


def figure2(place: Place) -> Grid:
    """Pictures before and after, ImageNet-10."""
    data = "imagenet10-64"
    return Grid(
        title="Figure 2: before and after, ImageNet-10",
        caption=size_caption(place, data),
        layout="panels",
        data=(evaluation_data(data, place, 10),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"),),
        attacks=tuple(literal_attacks(place, ("FGSM .08", "BIM", "CW"))),
        defenses=(no_defense(), *acsr(place, data)),
        chunk=5,
    )


def figure3(place: Place) -> Grid:
    """Every cluster's dictionary by Mahalanobis rank: the paper's core claim."""
    data = "cifar10"
    bundle = place.bundle_of(data)
    ranks = [
        SweepDefense(
            name=f"rank {rank}",
            config=DefenseConfig(name="rank", artifact=bundle, rank=rank, lmbda=0.1),
            family="rank",
        )
        for rank in range(1, len(load_bundle(bundle).atoms) + 1)
    ]
    return Grid(
        title="Figure 3: does the nearest cluster's dictionary matter?",
        caption=size_caption(place, data)
        + "CW images purified with every cluster's dictionary, by Mahalanobis rank; 1 is the nearest.",
        layout="ranks",
        data=(evaluation_data(data, place, 400),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"),),
        attacks=tuple(literal_attacks(place, ("CW",))),
        defenses=(no_defense(), *ranks, *controls(place, data)),
        chunk=50,
    )


def figure4(place: Place) -> Grid:
    """Accuracy against the strength of FGSM."""
    data = ("cifar10", "imagenet10-64")
    return Grid(
        title="Figure 4: accuracy against the strength of FGSM",
        caption=size_caption(place, *data, cw=False) + "Epsilon is linf on [0, 1] pixels, in 255ths.",
        layout="strengths",
        data=tuple(evaluation_data(name, place, 200 if name == "cifar10" else 100) for name in data),
        targets=tuple(
            SweepTarget(name=f"{title}, {name}", location=str(place.target(name, architecture)), data=(name,))
            for name in data
            for architecture, title in (("resnet50", "ResNet-50"), ("vgg16", "VGG-16"))
        ),
        attacks=tuple(
            SweepAttack(
                name=f"FGSM {epsilon}/255",
                attack=AttackConfig(name="fgsm", norm="linf", epsilon=epsilon / 255),
            )
            for epsilon in F4_EPSILONS
        ),
        defenses=(
            no_defense(),
            *(
                SweepDefense(
                    name=f"ACSR ({name})",
                    config=DefenseConfig(
                        name="acsr", artifact=place.bundle_of(name), lmbda=0.1, reconstruction="cbpdn"
                    ),
                    family="ACSR",
                    data=(name,),
                )
                for name in data
            ),
            single("JPEG 75", "jpeg", quality=75),
        ),
        chunk=50,
    )
