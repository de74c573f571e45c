"""The paper's tables and figures, and two of ours, as grids (METHOD, section 8), in two sizes.

`small` is for two CPU cores: quarter-width targets, 200 images or fewer (gray-box: 2,000 and a ResNet-9), BIM
of 20 and CW of 50 steps, CW without binary search. `full` is for GPUs: full width, the whole test split. Each
preset names its artifacts below one folder; `recipe` knows the command that makes each of them.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from acsr_ray.attacks.calibration import PAPER_ATTACKED, PAPER_CLEAN
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.threat import Norm
from acsr_ray.evaluation.defenses import DefenseConfig
from acsr_ray.evaluation.grid import (
    EvaluationData,
    Grid,
    GridError,
    SweepAttack,
    SweepDefense,
    SweepTarget,
)
from acsr_ray.purification.bundle import load_bundle

Variant = Literal["small", "full"]

PAPER_NAMES = {"FGSM .08": "fgsm_08", "FGSM .04": "fgsm_04", "BIM": "bim", "DF": "deepfool", "CW": "cw"}
F4_EPSILONS = (1, 2, 4, 8, 12, 16, 24, 32)
ADAPTIVE_EPSILONS = (1, 2, 4, 8, 64)


@dataclass(frozen=True)
class Place:
    """Where a preset finds what it needs."""

    variant: Variant
    data: Path
    artifacts: Path
    bundle: str

    @property
    def small(self) -> bool:
        """Whether this is the variant for two cores."""
        return self.variant == "small"

    @property
    def width(self) -> float:
        """Width factor of the paper's targets."""
        return 0.25 if self.small else 1.0

    def width_of(self, architecture: str) -> float:
        """Return the width factor of a target; ResNet-9 is there for a small target above 85 %."""
        return 0.375 if self.small and architecture == "resnet9" else self.width

    def splits(self, name: str) -> tuple[list[str], list[str], list[str]]:
        """Return the shards of train, validation and test of a data set, see `find_splits`."""
        return find_splits(self.data / name)

    def target(self, data: str, architecture: str, suffix: str = "") -> Path:
        """Return the folder of a target."""
        return self.artifacts / "targets" / f"{data}-{architecture}{suffix}-w{self.width_of(architecture):g}"

    def defense(self, data: str, kind: str) -> Path:
        """Return the folder of a trained defence."""
        return self.artifacts / "defenses" / f"{data}-{kind}"

    def bundle_of(self, data: str) -> str:
        """Return the bundle that purifies a data set; content filters are out of distribution (T5)."""
        return (
            str(self.artifacts / "bundles" / "imagenet10") if data.startswith("imagenet10") else self.bundle
        )


def find_splits(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return training, validation and test shards of a folder.

    Test is `test-*`, or `val-*` where there is no test; validation is `validation-*`, or `val-*` beside a
    test, else the last training shard, which then is no training shard.

    Raises:
        GridError: a split is missing.
    """
    found = {
        name: sorted(str(path) for path in folder.glob(f"{name}-*.parquet"))
        for name in ("train", "validation", "val", "test")
    }
    train, test = found["train"], found["test"] or found["val"]
    validation = found["validation"] or (found["val"] if found["test"] else [])
    if not validation and len(train) > 1:
        train, validation = train[:-1], train[-1:]
    if not (train and validation and test):
        raise GridError(
            f"{folder} needs train-*, test-* (or val-*) and validation shards; make them with "
            f"jobs/prepare_corpus.py"
        )
    return train, validation, test


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


def needed_artifacts(grid: Grid, place: Place) -> list[Path]:
    """Return the artifacts of a grid that lie below the artifacts' folder."""
    locations = [Path(target.location) for target in grid.targets]
    locations += [Path(d.config.artifact) for d in grid.defenses if d.config.artifact is not None]
    return [path for path in dict.fromkeys(locations) if path.is_relative_to(place.artifacts)]


def recipe(path: Path, place: Place) -> list[str]:
    """Return the commands that make one artifact of a preset."""
    kind, name = path.parent.name, path.name
    if kind == "targets":
        data, architecture, *rest = name.rsplit("-w", 1)[0].split("-", 2)
        if architecture in ("64", "128"):
            data, architecture = f"{data}-{architecture}", rest[0]
        flags = target_flags(data, architecture, "-adv" in name, "-pre" in name, place)
        if place.small and architecture == "resnet9" and "-start" not in name:
            # A warm restart: ten epochs alone end a point below 85 %.
            start = place.target(data, architecture, "-start")
            again = [*flags[:-4], "--optimizer.epochs", "4", "--optimizer.peak-lr", "0.05", "--seed", "1"]
            restart = _command("train_target", data, path, place, [*again, "--init-weights", str(start)])
            return [*recipe(start, place), restart]
        return [_command("train_target", data, path, place, flags)]
    if kind == "defenses":
        data, made = name.rsplit("-", 1)[0], name
        for known, job_kind in DEFENSE_KINDS.items():
            if name.endswith(f"-{known}"):
                data, made = name.removesuffix(f"-{known}"), job_kind
        size = ["--image-size", str(image_size(data))]
        return [_command("train_defense", data, path, place, ["--kind", made, *size], validated=False)]
    jobs = ("train_baseline", "learn_semantics", "train_robust", "build_bundle")
    config = "imagenet10-small.yaml" if kind == "bundles" else "cifar10-small.yaml"
    return [f"python jobs/{job}.py --config jobs/configs/{config}" for job in jobs]


DEFENSE_KINDS = {
    "magnet": "magnet",
    "pixel-cnn": "pixel_cnn",
    "stl": "global_dictionary",
    "patch-bank": "patch_bank",
}
"""Suffix of an artifact's folder -> kind of `train_defense`."""


def image_size(data: str) -> int:
    """Return the side of a data set's images, by its name."""
    return {"cifar10": 32, "moderation5": 64}.get(data) or int(data.rsplit("-", 1)[-1])


def target_flags(
    data: str, architecture: str, adversarial: bool, pretrained: bool, place: Place
) -> list[str]:
    """Return the training flags of one target; epochs of `small` fit two cores."""
    size, epochs = image_size(data), 40
    flags = [
        "--architecture",
        architecture,
        "--width",
        f"{place.width_of(architecture):g}",
        "--image-size",
        str(size),
    ]
    if place.small:
        epochs = {
            ("cifar10", "vgg16"): 18,
            ("cifar10", "alexnet"): 10,
            ("cifar10", "resnet50"): 7,
            ("cifar10", "googlenet"): 6,
            ("cifar10", "resnet9"): 10,
            ("imagenet10-128", "vgg16"): 12,
            ("imagenet10-64", "resnet50"): 12,
            ("moderation5", "resnet50"): 12,
        }.get((data, architecture), 20)
        if architecture == "resnet50":
            flags += ["--stem-stride", str(size // 16)]
        elif size > 32:
            flags += ["--stem-stride", str(size // 32)]
    if adversarial:
        kind = "single_step" if place.small else "pgd"
        flags += ["--adversarial", "--attack.kind", kind, "--attack.epsilon", "0.0157"]
    if pretrained:
        flags += ["--init-weights", str(place.target("imagenet10-64", architecture))]
        epochs = max(5, epochs // 3)
    if architecture == "resnet9":
        flags += ["--optimizer.peak-lr", "0.2"]
    return [*flags, "--optimizer.epochs", str(epochs)]


def _command(
    job: str, data: str, output: Path, place: Place, flags: Sequence[str], *, validated: bool = True
) -> str:
    train, validation, _ = place.splits(data)
    parts = ["python", f"jobs/{job}.py", "--train", *train]
    if validated:
        parts += ["--validation", *validation]
    return shlex.join([*parts, "--output", str(output), *flags])


def _data(
    name: str,
    place: Place,
    images: int | None,
    validation_images: int = 200,
) -> EvaluationData:
    _, validation, test = place.splits(name)
    return EvaluationData(
        name=name,
        test=tuple(test),
        validation=tuple(validation),
        image_size=image_size(name),
        images=images if place.small else None,
        validation_images=validation_images if place.small else 2000,
    )


def _target(place: Place, data: str, architecture: str, title: str, suffix: str = "") -> SweepTarget:
    location = str(place.target(data, architecture, suffix))
    return SweepTarget(name=title, location=location, data=(data,))


def _paper_configs(place: Place) -> dict[str, AttackConfig]:
    """Return the paper's five attacks at its literal budgets; `small` takes fewer steps."""
    relative: Norm = "relative_l2"
    bim_steps, cw_steps, search = (20, 50, 0) if place.small else (100, 100, 5)
    return {
        "FGSM .08": AttackConfig(name="fgsm", norm=relative, epsilon=0.08),
        "FGSM .04": AttackConfig(name="fgsm", norm=relative, epsilon=0.04),
        "BIM": AttackConfig(name="bim", norm=relative, epsilon=0.04, steps=bim_steps),
        "DF": AttackConfig(name="deepfool", norm=relative, epsilon=0.08, steps=100),
        "CW": AttackConfig(
            name="cw", norm=relative, epsilon=0.08, steps=cw_steps, binary_search_steps=search
        ),
    }


def calibrated_attacks(place: Place, names: Sequence[str] = tuple(PAPER_NAMES)) -> list[SweepAttack]:
    """Return the paper's attacks at budgets that give its bare accuracies (B0)."""
    configs = _paper_configs(place)
    return [
        SweepAttack(
            name=f"{name} (B0)",
            attack=configs[name],
            calibrate_to=PAPER_ATTACKED[PAPER_NAMES[name]] / PAPER_CLEAN,
            block="B0: calibrated to the paper's bare accuracies",
        )
        for name in names
    ]


def literal_attacks(place: Place, names: Sequence[str] = tuple(PAPER_NAMES)) -> list[SweepAttack]:
    """Return the paper's attacks at its literal relative l2 budgets (B1)."""
    configs = _paper_configs(place)
    return [
        SweepAttack(name=f"{name} (B1)", attack=configs[name], block="B1: literal relative l2 budgets")
        for name in names
    ]


def _noise(norm: Norm, epsilon: float) -> SweepAttack:
    return SweepAttack(
        name="noise", attack=AttackConfig(name="noise", norm=norm, epsilon=epsilon), block="Sanity"
    )


def _none() -> SweepDefense:
    return SweepDefense(name="none", config=DefenseConfig(name="none"))


def _coded(name: str, artifact: str, title: str, lmbdas: Sequence[float]) -> list[SweepDefense]:
    return [
        SweepDefense(
            name=f"{title} {lmbda:g}",
            config=DefenseConfig(name=name, artifact=artifact, lmbda=lmbda),
            family=title,
        )
        for lmbda in lmbdas
    ]


def _ladder(title: str, name: str, field: str, values: Sequence[float], **more: Any) -> list[SweepDefense]:  # noqa: ANN401
    return [
        SweepDefense(
            name=f"{title} {value:g}",
            config=DefenseConfig.model_validate({"name": name, field: value, **more}),
            family=title,
        )
        for value in values
    ]


def _single(title: str, name: str, **more: Any) -> SweepDefense:  # noqa: ANN401
    return SweepDefense(name=title, config=DefenseConfig.model_validate({"name": name, **more}))


def controls(place: Place, data: str, lmbdas: Sequence[float] = (0.1,)) -> list[SweepDefense]:
    """Return the controls of every table: what ACSR's parts and two cheap filters do alone."""
    bundle, stl = place.bundle_of(data), str(place.defense(dictionary_of(data), "stl"))
    return [
        *_coded("stl", stl, "STL (one dictionary)", lmbdas),
        *_coded("random_cluster", bundle, "random cluster", lmbdas),
        *_coded("dct_atoms", bundle, "DCT atoms", lmbdas),
        *_coded("random_atoms", bundle, "random atoms", lmbdas),
        _single("low band", "low_band", artifact=bundle),
        _single("Gaussian 0.5", "gaussian", sigma=0.5),
        _single("JPEG 75", "jpeg", quality=75),
    ]


def dictionary_of(data: str) -> str:
    """Return the data set that a data set's dictionaries were learnt on."""
    return {"moderation5": "cifar10", "imagenet10-128": "imagenet10-64"}.get(data, data)


def _acsr(place: Place, data: str, lmbdas: Sequence[float] = (0.1,)) -> list[SweepDefense]:
    return _coded("acsr", place.bundle_of(data), "ACSR", lmbdas)


def _size_caption(place: Place) -> str:
    if not place.small:
        return f"Full variant: full-width targets, the whole test split; bundle {place.bundle}. "
    return (
        f"Small variant: narrow targets, a seeded sample of the test split, bundle {place.bundle}, BIM of 20 "
        "steps, CW of 50 steps without binary search. "
    )


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
        data=(_data("cifar10", place, 200),),
        targets=tuple(targets),
        attacks=tuple(attacks),
        defenses=(_none(),),
    )


def _table2(place: Place) -> Grid:
    titles = {"alexnet": "AlexNet", "vgg16": "VGG-16", "resnet50": "ResNet-50", "googlenet": "GoogLeNet"}
    return Grid(
        title="Table 2: one purifier for four targets, CIFAR-10",
        caption=_size_caption(place) + "One f_rob and one bundle for all targets.",
        layout="targets",
        data=(_data("cifar10", place, 200),),
        targets=tuple(_target(place, "cifar10", name, title) for name, title in titles.items()),
        attacks=(*calibrated_attacks(place), *literal_attacks(place)),
        defenses=(_none(), *_acsr(place, "cifar10"), *controls(place, "cifar10")),
        chunk=50,
        reference="ACSR",
    )


def _table3(place: Place) -> Grid:
    data = "cifar10"
    return Grid(
        title="Table 3: defences on CIFAR-10, VGG-16",
        caption=_size_caption(place),
        data=(_data(data, place, 200),),
        targets=(_target(place, data, "vgg16", "VGG-16"),),
        attacks=(*calibrated_attacks(place), *literal_attacks(place), _noise("relative_l2", 0.04)),
        defenses=(
            _none(),
            *_acsr(place, data),
            _single("median 2", "median", size=2),
            _single("TVM", "tvm", weight=0.03),
            _single("MagNet", "magnet", artifact=str(place.defense(data, "magnet"))),
            _single("PixelDefend", "pixel_defend", artifact=str(place.defense(data, "pixel-cnn"))),
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
        caption=_size_caption(place) + "PixelDefend and MagNet left out.",
        data=(_data(data, place, images, 100),),
        targets=(_target(place, data, "vgg16", "VGG-16"),),
        attacks=tuple(_paper_attacks(place)),
        defenses=(
            _none(),
            *_acsr(place, data),
            _single("TVM", "tvm", weight=0.03),
            _single("quilting", "quilting", artifact=str(place.defense("imagenet10-64", "patch-bank"))),
            _single("crop ensemble", "crop_ensemble", crops=30, crop=0.9),
            _single("pixel deflection", "pixel_deflection", deflections=100),
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
        caption=_size_caption(place)
        + "Plain AlexNet and adversarially trained ResNet-50. The bundle never saw these images.",
        layout="filter",
        data=(_data(data, place, 200, 100),),
        targets=(
            _target(place, data, "alexnet", "AlexNet"),
            _target(place, data, "resnet50", "ResNet-50 (adversarially trained)", "-adv"),
        ),
        attacks=tuple(_paper_attacks(place)),
        defenses=(_none(), *_acsr(place, data), *controls(place, data)),
        chunk=25,
        reference="ACSR",
    )


def _figure2(place: Place) -> Grid:
    data = "imagenet10-64"
    return Grid(
        title="Figure 2: before and after, ImageNet-10",
        caption=_size_caption(place),
        layout="panels",
        data=(_data(data, place, 10),),
        targets=(_target(place, data, "vgg16", "VGG-16"),),
        attacks=tuple(literal_attacks(place, ("FGSM .08", "BIM", "CW"))),
        defenses=(_none(), *_acsr(place, data)),
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
        caption=_size_caption(place)
        + "CW images purified with every cluster's dictionary, by Mahalanobis rank; 1 is the nearest.",
        layout="ranks",
        data=(_data(data, place, 400),),
        targets=(_target(place, data, "vgg16", "VGG-16"),),
        attacks=tuple(literal_attacks(place, ("CW",))),
        defenses=(_none(), *ranks, *controls(place, data)),
        chunk=50,
    )


def _figure4(place: Place) -> Grid:
    data = ("cifar10", "imagenet10-64")
    return Grid(
        title="Figure 4: accuracy against the strength of FGSM",
        caption=_size_caption(place) + "Epsilon is linf on [0, 1] pixels, in 255ths.",
        layout="strengths",
        data=tuple(_data(name, place, 200 if name == "cifar10" else 100) for name in data),
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
            _none(),
            *(
                SweepDefense(
                    name=f"ACSR ({name})",
                    config=DefenseConfig(name="acsr", artifact=place.bundle_of(name), lmbda=0.1),
                    family="ACSR",
                    data=(name,),
                )
                for name in data
            ),
            _single("JPEG 75", "jpeg", quality=75),
        ),
        chunk=50,
    )


def _graybox(place: Place) -> Grid:
    data = "cifar10"
    bundle, stl = place.bundle_of(data), str(place.defense(data, "stl"))
    few, many = (0.05, 0.1), (0.05, 0.1, 0.2)
    noise = _noise("relative_l2", 0.04).model_copy(update={"images": 500})
    attacks = calibrated_attacks(place, ("FGSM .04", "BIM", "DF", "CW"))
    if place.small:
        # Two rungs in place of five: each costs a run of CW on the images that rounding brought back.
        rungs = {"strengths": ({"kappa": 2.0}, {"kappa": 8.0})}
        attacks[-1] = attacks[-1].model_copy(update={"attack": attacks[-1].attack.model_copy(update=rungs)})
    target = "resnet9" if place.small else "vgg16"
    return Grid(
        title="Gray-box: every defence at equal clean accuracy, CIFAR-10",
        caption=_size_caption(place)
        + "The attacker sees the bare target only. Strengths are chosen on the validation split. Left out: "
        "quilting, PixelDefend and TVM with dropout, the slow three.",
        data=(_data(data, place, 2000, 500),),
        targets=(_target(place, data, target, "ResNet-9" if place.small else "VGG-16"),),
        attacks=(
            *attacks,
            SweepAttack(
                name="PGD linf 4/255",
                attack=AttackConfig(name="pgd", norm="linf", epsilon=4 / 255, steps=20),
                block="B2 and noise",
            ),
            noise.model_copy(update={"block": "B2 and noise"}),
        ),
        defenses=(
            _none(),
            *_coded("acsr", bundle, "ACSR", many),
            *_coded("stl", stl, "STL (one dictionary)", many),
            *_coded("random_cluster", bundle, "random cluster", few),
            *_coded("dct_atoms", bundle, "DCT atoms", few),
            *_coded("random_atoms", bundle, "random atoms", (0.05,)),
            _single("low band", "low_band", artifact=bundle),
            *_ladder("JPEG", "jpeg", "quality", (90, 75, 60, 50, 40, 30)),
            _single("SHIELD", "shield"),
            *_ladder("median", "median", "size", (2, 3)),
            *_ladder("Gaussian", "gaussian", "sigma", (0.4, 0.5, 0.6)),
            *_ladder("TVM", "tvm", "weight", (0.02, 0.05)),
            *_ladder("crop ensemble", "crop_ensemble", "crop", (0.9,), crops=10),
            *_ladder("pixel deflection", "pixel_deflection", "deflections", (20, 100)),
            _single("MagNet", "magnet", artifact=str(place.defense(data, "magnet"))),
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
        caption=_size_caption(place) + "linf 4/255, PGD-20; Square with its query budget; BPDA and white-box "
        "see target and defence. EOT over 4 draws where a defence is random. The low-frequency attacker may "
        "add what the split's low band passes of a linf 4/255 perturbation, which is shorter in l2.",
        layout="adaptive",
        data=(_data(data, place, 100),),
        targets=(
            _target(place, data, "vgg16", "VGG-16"),
            _target(place, data, "resnet50", "ResNet-50").model_copy(update={"source_only": True}),
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
            _noise(norm, epsilon),
        ),
        defenses=(
            _none(),
            *_coded("acsr", bundle, "ACSR", (0.1,)),
            *_coded("stl", stl, "STL (one dictionary)", (0.1,)),
            *_coded("random_cluster", bundle, "random cluster", (0.1,)),
            _single("Gaussian 0.5", "gaussian", sigma=0.5),
            _single("JPEG 75", "jpeg", quality=75),
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
