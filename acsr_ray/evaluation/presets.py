"""The paper's tables and figures, and two of ours, as grids (METHOD, section 8), in two sizes.

`small` is for two CPU cores: quarter-width targets, 200 images or fewer (gray-box: 2,000 and a ResNet-9), BIM
of 20 and CW of 50 steps, CW without binary search. `full` is for GPUs: full width, the whole test split. Each
preset names its artifacts below one folder; `recipe` knows the command that makes each of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.threat import Norm
from acsr_ray.evaluation.defenses import DefenseConfig
from acsr_ray.evaluation.grid import Grid, GridError, SweepAttack, SweepDefense, SweepTarget
from acsr_ray.evaluation.ingredients import (
    acsr,
    calibrated_attacks,
    coded,
    controls,
    evaluation_data,
    ladder,
    literal_attacks,
    no_defense,
    noise,
    single,
    size_caption,
    sweep_target,
)
from acsr_ray.evaluation.recipes import Place, Variant, needed_artifacts, recipe
from acsr_ray.purification.bundle import load_bundle

F4_EPSILONS = (1, 2, 4, 8, 12, 16, 24, 32)
ADAPTIVE_EPSILONS = (1, 2, 4, 8, 64)


def preset_grid(name: str, variant: Variant, data: Path, artifacts: Path, bundle: str) -> Grid:
    """Return the grid of a table or figure, named as in `PRESETS`.

    Args:
        name: which.
        variant: `small` or `full`.
        data: folder that holds the data sets' folders.
        artifacts: folder that holds targets, bundles and trained defences.
        bundle: bundle of CIFAR-10.

    Raises:
        GridError: shards or artifacts are missing; the message holds the commands that make them.
    """
    place = Place(variant, data, artifacts, bundle)
    grid = PRESETS[name](place)
    missing = [path for path in needed_artifacts(grid, place) if not (path / "manifest.json").exists()]
    if missing:
        commands = [line for path in missing for line in recipe(path, place)]
        raise GridError(
            f"{name} ({variant}) needs artifacts that are not there; make them with\n  "
            + "\n  ".join(dict.fromkeys(commands))
        )
    return grid


def _table1(place: Place) -> Grid:
    rows = {
        "f_bsl (no adversarial training)": "baseline",
        "PGDAT": "pgdat",
        "PGDAT + RST (init PGDAT)": "pgdat-rst",
        "PGDAT (random init)": "pgdat-random",
        "PGDAT + RST (random init)": "rst-random",
        "TRADES": "trades",
        "PGDAT + RST (TRADES)": "rst-trades",
        "RST, single-step (bundle cifar10-small)": "rst-single-step",
    }
    folder = place.artifacts / "encoders"
    targets = [
        SweepTarget(name=title, location=str(folder / f"cifar10-{name}"))
        for title, name in rows.items()
        if (folder / f"cifar10-{name}" / "manifest.json").exists()
    ]
    if not targets:
        raise GridError(
            f"table 1 needs encoders of train_baseline and train_robust as {folder}/cifar10-NAME, "
            f"NAME one of {', '.join(rows.values())}"
        )
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
    absent = len(rows) - len(targets)
    return Grid(
        title="Table 1: robust encoders under white-box attacks, CIFAR-10",
        caption=f"{len(targets)} WideResNets attacked white-box, CW of 100 steps; {absent} rows of the paper "
        "are not trained.",
        layout="targets",
        data=(evaluation_data("cifar10", place, 200),),
        targets=tuple(targets),
        attacks=tuple(attacks),
        defenses=(no_defense(),),
    )


def _table2(place: Place) -> Grid:
    titles = {"alexnet": "AlexNet", "vgg16": "VGG-16", "resnet50": "ResNet-50", "googlenet": "GoogLeNet"}
    return Grid(
        title="Table 2: one purifier for four targets, CIFAR-10",
        caption=size_caption(place) + "One f_rob and one bundle for all targets.",
        layout="targets",
        data=(evaluation_data("cifar10", place, 200),),
        targets=tuple(sweep_target(place, "cifar10", name, title) for name, title in titles.items()),
        attacks=(*calibrated_attacks(place), *literal_attacks(place)),
        defenses=(no_defense(), *acsr(place, "cifar10"), *controls(place, "cifar10")),
        chunk=50,
        reference="ACSR",
    )


def _table3(place: Place) -> Grid:
    data = "cifar10"
    return Grid(
        title="Table 3: defences on CIFAR-10, VGG-16",
        caption=size_caption(place),
        data=(evaluation_data(data, place, 200),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"),),
        attacks=(*calibrated_attacks(place), *literal_attacks(place), noise("relative_l2", 0.04)),
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


def _table4(place: Place, size: int) -> Grid:
    data = f"imagenet10-{size}"
    images = 200 if size == 64 else 50
    return Grid(
        title=f"Table 4: defences on ImageNet-10 at {size} pixels, VGG-16",
        caption=size_caption(place) + "PixelDefend and MagNet left out.",
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
    """Return the calibrated attacks, and the literal ones where there is the time."""
    return [*calibrated_attacks(place), *([] if place.small else literal_attacks(place))]


def _table5(place: Place) -> Grid:
    data = "moderation5"
    return Grid(
        title="Table 5: a five-class content filter, dictionaries from CIFAR-10",
        caption=size_caption(place)
        + "Plain AlexNet and adversarially trained ResNet-50. The bundle never saw these images.",
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


def _figure2(place: Place) -> Grid:
    data = "imagenet10-64"
    return Grid(
        title="Figure 2: before and after, ImageNet-10",
        caption=size_caption(place),
        layout="panels",
        data=(evaluation_data(data, place, 10),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"),),
        attacks=tuple(literal_attacks(place, ("FGSM .08", "BIM", "CW"))),
        defenses=(no_defense(), *acsr(place, data)),
        chunk=5,
    )


def _figure3(place: Place) -> Grid:
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
        caption=size_caption(place)
        + "CW images purified with every cluster's dictionary, by Mahalanobis rank; 1 is the nearest.",
        layout="ranks",
        data=(evaluation_data(data, place, 400),),
        targets=(sweep_target(place, data, "vgg16", "VGG-16"),),
        attacks=tuple(literal_attacks(place, ("CW",))),
        defenses=(no_defense(), *ranks, *controls(place, data)),
        chunk=50,
    )


def _figure4(place: Place) -> Grid:
    data = ("cifar10", "imagenet10-64")
    return Grid(
        title="Figure 4: accuracy against the strength of FGSM",
        caption=size_caption(place) + "Epsilon is linf on [0, 1] pixels, in 255ths.",
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
                    config=DefenseConfig(name="acsr", artifact=place.bundle_of(name), lmbda=0.1),
                    family="ACSR",
                    data=(name,),
                )
                for name in data
            ),
            single("JPEG 75", "jpeg", quality=75),
        ),
        chunk=50,
    )


def _graybox(place: Place) -> Grid:
    data = "cifar10"
    bundle, stl = place.bundle_of(data), str(place.defense(data, "stl"))
    few, many = (0.05, 0.1), (0.05, 0.1, 0.2)
    harmless = noise("relative_l2", 0.04).model_copy(update={"images": 500})
    attacks = calibrated_attacks(place, ("FGSM .04", "BIM", "DF", "CW"))
    if place.small:
        # Two rungs in place of five: each costs a run of CW on the images that rounding brought back.
        rungs = {"strengths": ({"kappa": 2.0}, {"kappa": 8.0})}
        attacks[-1] = attacks[-1].model_copy(update={"attack": attacks[-1].attack.model_copy(update=rungs)})
    target = "resnet9" if place.small else "vgg16"
    return Grid(
        title="Gray-box: every defence at equal clean accuracy, CIFAR-10",
        caption=size_caption(place)
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
            *coded("acsr", bundle, "ACSR", many),
            *coded("stl", stl, "STL (one dictionary)", many),
            *coded("random_cluster", bundle, "random cluster", few),
            *coded("dct_atoms", bundle, "DCT atoms", few),
            *coded("random_atoms", bundle, "random atoms", (0.05,)),
            single("low band", "low_band", artifact=bundle),
            *ladder("JPEG", "jpeg", "quality", (90, 75, 60, 50, 40, 30)),
            single("SHIELD", "shield"),
            *ladder("median", "median", "size", (2, 3)),
            *ladder("Gaussian", "gaussian", "sigma", (0.4, 0.5, 0.6)),
            *ladder("TVM", "tvm", "weight", (0.02, 0.05)),
            *ladder("crop ensemble", "crop_ensemble", "crop", (0.9,), crops=10),
            *ladder("pixel deflection", "pixel_deflection", "deflections", (20, 100)),
            single("MagNet", "magnet", artifact=str(place.defense(data, "magnet"))),
        ),
        chunk=100,
        choose=True,
        reference="ACSR",
    )


def _adaptive(place: Place) -> Grid:
    data = "cifar10"
    norm: Norm = "linf"
    bundle, stl = place.bundle_of(data), str(place.defense(data, "stl"))
    epsilon = 4 / 255
    pgd = AttackConfig(name="pgd", norm=norm, epsilon=epsilon, steps=20)
    square = AttackConfig(name="square", norm=norm, epsilon=epsilon, queries=200 if place.small else 5000)
    everything = (
        "none",
        "ACSR 0.1",
        "STL (one dictionary) 0.1",
        "random cluster 0.1",
        "Gaussian 0.5",
        "JPEG 75",
    )
    differentiable = ("none", "ACSR 0.1", "STL (one dictionary) 0.1", "Gaussian 0.5")
    strengths = [
        SweepAttack(
            name=f"white-box {step}/255",
            attack=pgd.with_epsilon(step / 255),
            knowledge="white_box",
            images=50 if place.small else None,
            defenses=("none", "ACSR 0.1"),
            block="White-box PGD-20 by budget",
        )
        for step in ADAPTIVE_EPSILONS
    ]
    columns = (
        ("gray-box", "gray_box", pgd, everything),
        ("transfer", "transfer", pgd, everything),
        ("BPDA", "bpda", pgd, everything[1:]),
        ("white-box", "white_box", pgd, differentiable),
        ("white-box, fixed dictionary", "white_box_fixed", pgd, ("ACSR 0.1",)),
        ("low-frequency", "low_frequency", pgd, differentiable),
        ("selection", "selection", pgd, ("ACSR 0.1",)),
        ("Square", "white_box", square, ("none", "ACSR 0.1", "Gaussian 0.5", "JPEG 75")),
    )
    return Grid(
        title="Adaptive attacks: what the attacker knows, CIFAR-10",
        caption=size_caption(place) + "linf 4/255, PGD-20; Square with its query budget; BPDA and white-box "
        "see target and defence. EOT over 4 draws where a defence is random. The low-frequency attacker may "
        "add what the split's low band passes of a linf 4/255 perturbation, which is shorter in l2.",
        layout="adaptive",
        data=(evaluation_data(data, place, 100),),
        targets=(
            sweep_target(place, data, "vgg16", "VGG-16"),
            sweep_target(place, data, "resnet50", "ResNet-50").model_copy(update={"source_only": True}),
        ),
        attacks=(
            *(
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
            ),
            *strengths,
            noise(norm, epsilon),
        ),
        defenses=(
            no_defense(),
            *coded("acsr", bundle, "ACSR", (0.1,)),
            *coded("stl", stl, "STL (one dictionary)", (0.1,)),
            *coded("random_cluster", bundle, "random cluster", (0.1,)),
            single("Gaussian 0.5", "gaussian", sigma=0.5),
            single("JPEG 75", "jpeg", quality=75),
        ),
        chunk=50,
    )


PRESETS: Mapping[str, Callable[[Place], Grid]] = {
    "table 1": _table1,
    "table 2": _table2,
    "table 3": _table3,
    "table 4": lambda place: _table4(place, 64),
    "table 4-128": lambda place: _table4(place, 128),
    "table 5": _table5,
    "table adaptive": _adaptive,
    "table graybox": _graybox,
    "figure 2": _figure2,
    "figure 3": _figure3,
    "figure 4": _figure4,
}
