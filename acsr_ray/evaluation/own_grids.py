"""Two grids of ours: every defence at equal clean accuracy, and attackers who know the purifier."""

from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.evaluation.grid import Grid, SweepAttack
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
from acsr_ray.evaluation.recipes import Place

ADAPTIVE_EPSILONS = (1, 2, 4, 8, 64)
ADAPTIVE_NOISE = (4, 8)


def graybox(place: Place) -> Grid:
    """Every defence but the slow three, each at several strengths, against an attacker of the bare target."""
    data = "cifar10"
    bundle, stl = place.bundle_of(data), str(place.defense(data, "stl"))
    few, many, more = (0.05, 0.1), (0.05, 0.1, 0.2), (0.05, 0.07, 0.1, 0.14, 0.2)
    harmless = noise("relative_l2", 0.04).model_copy(update={"images": 500})
    attacks = calibrated_attacks(place, ("FGSM .04", "BIM", "DF", "CW"))
    if place.small:
        # Two rungs in place of five: each costs a run of CW on the images that rounding brought back.
        rungs = {"strengths": ({"kappa": 2.0}, {"kappa": 8.0})}
        attacks[-1] = attacks[-1].model_copy(update={"attack": attacks[-1].attack.model_copy(update=rungs)})
    target = "resnet9" if place.small else "vgg16"
    return Grid(
        title="Gray-box: every defence at equal clean accuracy, CIFAR-10",
        caption=size_caption(place, data)
        + (
            "The target is a ResNet-9 of 3/8 width; CW tries kappa 2 and 8 where rounding undid it. "
            if place.small
            else ""
        )
        + "The attacker sees the bare target only. Strengths are chosen on the validation split. Left out: "
        "quilting, PixelDefend and TVM with dropout, the slow three.",
        data=(evaluation_data(data, place, 2000, 500),),
        targets=(sweep_target(place, data, target, "ResNet-9" if place.small else "VGG-16"),),
        attacks=(
            *attacks,
            SweepAttack(
                name="PGD linf 4/255",
                attack=AttackConfig(name="pgd", norm="linf", epsilon=4 / 255, steps=20),
                block="B2 and noise",
            ),
            harmless.model_copy(update={"block": "B2 and noise"}),
        ),
        defenses=(
            no_defense(),
            *coded("acsr", bundle, "ACSR", more, reconstruction="cbpdn"),
            *coded("stl", stl, "STL (one dictionary)", many),
            *coded("random_cluster", bundle, "random cluster", few),
            *coded("dct_atoms", bundle, "DCT atoms", few),
            *coded("random_atoms", bundle, "random atoms", few),
            single("low band", "low_band", artifact=bundle),
            *ladder("JPEG", "jpeg", "quality", (90, 75, 60, 50, 40, 30)),
            single("SHIELD", "shield"),
            *ladder("median", "median", "size", (2, 3)),
            *ladder("Gaussian", "gaussian", "sigma", (0.4, 0.5, 0.6)),
            *ladder("TVM", "tvm", "weight", (0.02, 0.05)),
            *ladder("crop ensemble", "crop_ensemble", "crop", (0.9, 0.95), crops=10),
            *ladder("pixel deflection", "pixel_deflection", "deflections", (20, 100)),
            single("MagNet", "magnet", artifact=str(place.defense(data, "magnet"))),
        ),
        chunk=100,
        choose=True,
        reference="ACSR",
    )


def adaptive(place: Place) -> Grid:
    """What each defence leaves when the attacker knows more and more of it."""
    data = "cifar10"
    bundle, stl = place.bundle_of(data), str(place.defense(data, "stl"))
    first = " (first 50 images)" if place.small else ""
    return Grid(
        title="Adaptive attacks: what the attacker knows, CIFAR-10",
        caption=size_caption(place, data, cw=False)
        + f"linf 4/255, PGD-20; Square with {_square(place).queries} queries{first}; BPDA and white-box see "
        "target and defence. EOT over 4 draws where a defence is random. The low-frequency attacker may add "
        "what the split's low band passes, brought to linf 4/255.",
        layout="adaptive",
        data=(evaluation_data(data, place, 100),),
        targets=(
            sweep_target(place, data, "vgg16", "VGG-16"),
            sweep_target(place, data, "resnet50", "ResNet-50").model_copy(update={"source_only": True}),
        ),
        attacks=(
            *_by_knowledge(place),
            *_by_budget(place),
            *(
                noise("linf", epsilon / 255).model_copy(update={"name": f"noise {epsilon}/255"})
                for epsilon in ADAPTIVE_NOISE
            ),
        ),
        defenses=(
            no_defense(),
            *coded("acsr", bundle, "ACSR", (0.1,), reconstruction="cbpdn"),
            *coded("stl", stl, "STL (one dictionary)", (0.1,)),
            *coded("random_cluster", bundle, "random cluster", (0.1,)),
            *coded("dct_atoms", bundle, "DCT atoms", (0.1,)),
            *coded("random_atoms", bundle, "random atoms", (0.1,)),
            single("low band", "low_band", artifact=bundle),
            single("Gaussian 0.5", "gaussian", sigma=0.5),
            single("JPEG 75", "jpeg", quality=75),
        ),
        chunk=50,
    )


def _pgd(epsilon: int) -> AttackConfig:
    return AttackConfig(name="pgd", norm="linf", epsilon=epsilon / 255, steps=20)


def _square(place: Place) -> AttackConfig:
    queries = 500 if place.small else 5000
    return AttackConfig(name="square", norm="linf", epsilon=4 / 255, queries=queries)


def _by_knowledge(place: Place) -> list[SweepAttack]:
    """Return a column for each kind of attacker."""
    acsr, coding = "ACSR 0.1", ("STL (one dictionary) 0.1", "DCT atoms 0.1", "random atoms 0.1")
    everything = ("none", acsr, *coding, "random cluster 0.1", "low band", "Gaussian 0.5", "JPEG 75")
    pgd = _pgd(4)
    columns = (
        ("gray-box", "gray_box", pgd, everything),
        ("transfer", "transfer", pgd, everything),
        ("BPDA", "bpda", pgd, everything[1:]),
        ("white-box", "white_box", pgd, ("none", acsr, coding[0], "low band", "Gaussian 0.5")),
        ("white-box, fixed dictionary", "white_box_fixed", pgd, (acsr,)),
        ("low-frequency", "low_frequency", pgd, ("none", acsr, coding[0], "Gaussian 0.5")),
        ("selection", "selection", pgd, (acsr,)),
        ("Square", "white_box", _square(place), ("none", acsr)),
    )
    return [
        SweepAttack.model_validate(
            {
                "name": name,
                "attack": config,
                "knowledge": knowledge,
                "source": "ResNet-50" if knowledge == "transfer" else None,
                "defenses": defenses,
                "eot_samples": 4,
                "images": 50 if place.small and config.name == "square" else None,
                "block": "linf 4/255",
            }
        )
        for name, knowledge, config, defenses in columns
    ]


def _by_budget(place: Place) -> list[SweepAttack]:
    """Return the white-box attack at growing budgets, up to one that nothing withstands."""
    return [
        SweepAttack(
            name=f"white-box {epsilon}/255",
            attack=_pgd(epsilon),
            knowledge="white_box",
            images=50 if place.small else None,
            defenses=("none", "ACSR 0.1"),
            block="White-box PGD-20 by budget",
        )
        for epsilon in ADAPTIVE_EPSILONS
    ]
