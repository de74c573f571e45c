"""What the presets are put together from: the paper's attacks at two kinds of budget, defences, controls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acsr_ray.attacks.calibration import PAPER_ATTACKED, PAPER_CLEAN
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.threat import Norm
from acsr_ray.evaluation.defenses import DefenseConfig
from acsr_ray.evaluation.grid import EvaluationData, SweepAttack, SweepDefense, SweepTarget
from acsr_ray.evaluation.recipes import Place, image_size

PAPER_NAMES = {"FGSM .08": "fgsm_08", "FGSM .04": "fgsm_04", "BIM": "bim", "DF": "deepfool", "CW": "cw"}


def evaluation_data(
    name: str,
    place: Place,
    images: int | None,
    validation_images: int = 200,
) -> EvaluationData:
    """Return a data set: `images` test images where small, all of them else."""
    _, validation, test = place.splits(name)
    return EvaluationData(
        name=name,
        test=tuple(test),
        validation=tuple(validation),
        image_size=image_size(name),
        images=images if place.small else None,
        validation_images=validation_images if place.small else 2000,
    )


def sweep_target(place: Place, data: str, architecture: str, title: str, suffix: str = "") -> SweepTarget:
    """Return a target of ours on one data set."""
    location = str(place.target(data, architecture, suffix))
    return SweepTarget(name=title, location=location, data=(data,))


def paper_configs(place: Place) -> dict[str, AttackConfig]:
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
    configs = paper_configs(place)
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
    configs = paper_configs(place)
    return [
        SweepAttack(name=f"{name} (B1)", attack=configs[name], block="B1: literal relative l2 budgets")
        for name in names
    ]


def noise(norm: Norm, epsilon: float) -> SweepAttack:
    """Return random noise of a norm, for the sanity check."""
    return SweepAttack(
        name="noise", attack=AttackConfig(name="noise", norm=norm, epsilon=epsilon), block="Sanity"
    )


def no_defense() -> SweepDefense:
    """Return the defence that does nothing."""
    return SweepDefense(name="none", config=DefenseConfig(name="none"))


def coded(
    name: str,
    artifact: str,
    title: str,
    lmbdas: Sequence[float],
    **more: Any,  # noqa: ANN401
) -> list[SweepDefense]:
    """Return a sparse-coding defence at several lambdas, as one family."""
    return [
        SweepDefense(
            name=f"{title} {lmbda:g}",
            config=DefenseConfig(name=name, artifact=artifact, lmbda=lmbda, **more),
            family=title,
        )
        for lmbda in lmbdas
    ]


def ladder(title: str, name: str, field: str, values: Sequence[float], **more: Any) -> list[SweepDefense]:  # noqa: ANN401
    """Return a defence at several values of one parameter, as one family."""
    return [
        SweepDefense(
            name=f"{title} {value:g}",
            config=DefenseConfig.model_validate({"name": name, field: value, **more}),
            family=title,
        )
        for value in values
    ]


def single(title: str, name: str, **more: Any) -> SweepDefense:  # noqa: ANN401
    """Return a defence at one strength."""
    return SweepDefense(name=title, config=DefenseConfig.model_validate({"name": name, **more}))


def controls(place: Place, data: str, lmbdas: Sequence[float] = (0.1,)) -> list[SweepDefense]:
    """Return the controls of every table: what ACSR's parts and two cheap filters do alone."""
    bundle, stl = place.bundle_of(data), str(place.defense(dictionary_of(data), "stl"))
    return [
        *coded("stl", stl, "STL (one dictionary)", lmbdas),
        *coded("random_cluster", bundle, "random cluster", lmbdas),
        *coded("dct_atoms", bundle, "DCT atoms", lmbdas),
        *coded("random_atoms", bundle, "random atoms", lmbdas),
        single("low band", "low_band", artifact=bundle),
        single("Gaussian 0.5", "gaussian", sigma=0.5),
        single("JPEG 75", "jpeg", quality=75),
    ]


def dictionary_of(data: str) -> str:
    """Return the data set that a data set's dictionaries were learnt on."""
    return {"moderation5": "cifar10", "imagenet10-128": "imagenet10-64"}.get(data, data)


def acsr(place: Place, data: str, lmbdas: Sequence[float] = (0.1,)) -> list[SweepDefense]:
    """Return ACSR as in the paper, with the data set's bundle."""
    return coded("acsr", place.bundle_of(data), "ACSR", lmbdas, reconstruction="cbpdn")


def size_caption(place: Place, *data: str, cw: bool = True) -> str:
    """Return what a reader must know of the variant.

    Args:
        place: variant and folders.
        data: data sets of the grid, whose bundles are named.
        cw: whether the paper's iterative attacks are in the grid.
    """
    bundles = ", ".join(dict.fromkeys(Path(place.bundle_of(name)).name for name in data))
    if not place.small:
        return f"Full variant: full-width targets, the whole test split; bundle {bundles}. "
    stem = "" if set(data) == {"cifar10"} else " and first convolutions of stride 2 or 4"
    steps = " BIM of 20 steps, CW of 50 steps without binary search." if cw else ""
    return (
        f"Small variant: targets of quarter width{stem}, a seeded sample of the test split; bundle "
        f"{bundles}.{steps} "
    )
