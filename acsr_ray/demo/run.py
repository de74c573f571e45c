"""The demo: corpus, stages i to iii, a separate target, four attacks on it, purification, and what it bought.

The attacks see the bare target only (gray-box). Attacked images are rounded to 8 bits before anything is
measured. The numbers are about 360 digits; they show that the machine works, not how well it does on photos.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from acsr_ray.attacks.run import run_attack
from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.attacks.torchattacks_adapter import load_torchattacks
from acsr_ray.clustering.elbow import ElbowConfig
from acsr_ray.columns import CLASS, IMAGE
from acsr_ray.corpus.images import (
    DecodeLimits,
    Pixels,
    decode_image,
    encode_png,
    to_pixels,
    to_unit_range,
)
from acsr_ray.corpus.labelled import image_bytes
from acsr_ray.corpus.writing import write_shard
from acsr_ray.demo.digits import CLASS_NAMES, Split, load_splits
from acsr_ray.distributed.bundling import BuildBundleSettings, build_bundle
from acsr_ray.distributed.dictionaries import DictionaryConfig
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.runtime import ray_session
from acsr_ray.distributed.semantics import LearnSemanticsSettings, learn_semantics
from acsr_ray.distributed.training import (
    TrainBaselineSettings,
    TrainRobustSettings,
    train_baseline,
    train_robust,
)
from acsr_ray.evaluation.intervals import wilson_share
from acsr_ray.evaluation.panels import draw_panel, magnified_difference
from acsr_ray.evaluation.report import Panel, Section, html_report
from acsr_ray.evaluation.tables import Table
from acsr_ray.models.small_cnn import SmallCnn
from acsr_ray.sparse.cbpdn import CbpdnConfig
from acsr_ray.sparse.cdl import CdlConfig
from acsr_ray.training.loop import OptimizerConfig, fit, predict
from acsr_ray.training.objectives import InnerAttack
from acsr_ray.training.settings import RunSettings

logger = logging.getLogger(__name__)

HERE = RunSettings(workers=0)
"""A minute of training is not worth a worker of its own."""
EPSILON = 16 / 255
ATTACKS = {
    "FGSM": AttackConfig(name="torchattacks.FGSM", options={"eps": EPSILON}),
    "BIM": AttackConfig(
        name="torchattacks.BIM", options={"eps": EPSILON, "alpha": EPSILON / 10, "steps": 20}
    ),
    "DeepFool": AttackConfig(
        name="torchattacks.DeepFool",
        options={"steps": 30, "overshoot": 0.02},
        strengths=({"overshoot": 0.5},),
    ),
    "CW": AttackConfig(
        name="torchattacks.CW",
        options={"c": 1.0, "steps": 60, "lr": 0.02, "kappa": 0.0},
        strengths=({"kappa": 3.0},),
    ),
}
CODE = CbpdnConfig(lmbda=0.1, iterations=30, rho=4.0)
HEADER = ("test images", "target, bare %", "purified %", "float, bare %", "relative l2", "cluster of class %")
PANEL_IMAGES = 10


@dataclass(frozen=True)
class Outcome:
    """What happened to one variant of the test split (clean, or one attack)."""

    name: str
    before: Pixels
    after: Pixels
    row: tuple[str, ...]


def run_demo(settings: PurifyCorpusSettings) -> dict[str, Any]:
    """Run everything, write `report.html` into the demo's folder and return the closing summary."""
    load_torchattacks()
    # One Ray for all stages; each would start its own.
    with ray_session(settings.ray):
        return _run(settings, Path(settings.output or "demo"))


def _run(settings: PurifyCorpusSettings, root: Path) -> dict[str, Any]:
    splits = load_splits()
    bundle = build_digits_bundle(root, splits, settings)
    test = splits["test"]
    target = train_target(splits["train"])
    variants = attack_variants(target, test)
    corpus = root / "corpus" / "uploads"
    for name, (pixels, _) in variants.items():
        write_shard(corpus / f"{name}.parquet", pixels, test.labels, test.image_ids, CLASS_NAMES)
    _forget(root / "purified")
    logger.info("step 7 of 7: purify all of it")
    summary = purify_corpus(
        settings.model_copy(
            update={
                "input": str(corpus),
                "output": str(root / "purified"),
                "bundle": str(bundle),
                "demo": False,
                "limit": None,
                "image_column": IMAGE,
            }
        )
    )
    purified = read_purified(root / "purified")
    outcomes = [
        _measure(name, test, pixels, floats, *purified[name], target)
        for name, (pixels, floats) in variants.items()
    ]
    (root / "report.html").write_text(_report(outcomes, summary))
    (root / "before_after.png").write_bytes(encode_png(_overview(outcomes)))
    print_table(outcomes)
    return {**summary, "report": str((root / "report.html").resolve())}


def build_digits_bundle(root: Path, splits: dict[str, Split], settings: PurifyCorpusSettings) -> Path:
    """Run stages i and ii on the digits and return the bundle's folder."""
    train = (str(splits["train"].write(root / "corpus")),)
    validation = (str(splits["validation"].write(root / "corpus")),)
    work = root / "artifacts"
    optimizer = OptimizerConfig(epochs=8, batch_size=64, lanes=4, crop_padding=2, flip=False)
    where = {"device": settings.device}
    logger.info("step 1 of 7, stage i: baseline")
    train_baseline(
        TrainBaselineSettings(
            train=train,
            validation=validation,
            output=work / "baseline",
            architecture="wrn-10-1",
            optimizer=optimizer,
            run=HERE,
            **where,
        )
    )
    logger.info("step 2 of 7, stage i: clusters and dictionaries")
    learn_semantics(
        LearnSemanticsSettings(
            train=train,
            baseline=work / "baseline",
            output=work / "semantics",
            elbow=ElbowConfig(k_max=4),
            dictionary=DictionaryConfig(images=60, cdl=CdlConfig(num_atoms=48, code=CODE, epochs=2)),
            ray=settings.ray,
            **where,
        )
    )
    logger.info("step 3 of 7, stage ii: robust semantic training, single-step inner loop")
    train_robust(
        TrainRobustSettings(
            train=train,
            validation=validation,
            baseline=work / "baseline",
            semantics=work / "semantics",
            output=work / "robust",
            attack=InnerAttack(kind="single_step", norm="linf", epsilon=EPSILON),
            optimizer=optimizer.model_copy(update={"peak_lr": 0.05}),
            run=HERE,
            **where,
        )
    )
    logger.info("step 4 of 7: bundle")
    build_bundle(
        BuildBundleSettings(
            name="digits",
            baseline=work / "baseline",
            semantics=work / "semantics",
            robust=work / "robust",
            output=root / "bundle",
            validation=validation,
            cbpdn=CODE,
            ray=settings.ray,
            **where,
        )
    )
    return root / "bundle"


def train_target(split: Split) -> SmallCnn:
    """Train the classifier to defend: another architecture and seed than the encoder's."""
    logger.info("step 5 of 7: target classifier")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        target = SmallCnn(len(CLASS_NAMES))
    fit(
        target,
        split.pixels,
        split.labels,
        lambda images, labels, _: F.cross_entropy(target(images), labels),
        OptimizerConfig(epochs=12, batch_size=64, peak_lr=0.05, crop_padding=2, flip=False),
        device="cpu",
        seed=7,
        on_epoch=lambda _: None,
    )
    return target


def attack_variants(target: SmallCnn, split: Split) -> dict[str, tuple[Pixels, NDArray[np.int64] | None]]:
    """Return the split clean and attacked: 8-bit pixels, and predictions before rounding for attacks."""
    images = torch.from_numpy(to_unit_range(split.pixels))
    labels = torch.from_numpy(split.labels)
    variants: dict[str, tuple[Pixels, NDArray[np.int64] | None]] = {"clean": (split.pixels, None)}
    for name, config in ATTACKS.items():
        logger.info("step 6 of 7: attack %s", name)
        # All at once: torchattacks' CW stops for the batch as a whole.
        attacked = run_attack(config, target, images, labels, seed=0, batch_size=None)
        with torch.inference_mode():
            floats = target(attacked.unrounded).argmax(1).numpy()
        variants[name] = (to_pixels(attacked.rounded.numpy()), floats)
    return variants


def read_purified(output: Path) -> dict[str, tuple[Pixels, NDArray[Any]]]:
    """Return pixels (N, H, W, 3) and selected classes (N,) of every shard of a purified corpus."""
    found: dict[str, list[tuple[Pixels, NDArray[Any]]]] = {}
    for path in sorted((output / "data").glob("*.parquet")):
        table = pq.read_table(path)
        images = [decode_image(data, DecodeLimits()) for data in image_bytes(table["image"])]
        classes = table[CLASS].to_numpy()
        found.setdefault(path.name.split(".rows-")[0], []).append((np.stack(images), classes))
    return {
        name: (np.concatenate([p for p, _ in parts]), np.concatenate([c for _, c in parts]))
        for name, parts in found.items()
    }


def print_table(outcomes: list[Outcome]) -> None:
    """Print what purification bought, with 95 % intervals."""
    rows = [HEADER, *(outcome.row for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _measure(
    name: str,
    split: Split,
    before: Pixels,
    floats: NDArray[Any] | None,
    after: Pixels,
    classes: NDArray[Any],
    target: SmallCnn,
) -> Outcome:
    def share(hits: NDArray[Any]) -> str:
        return str(wilson_share(int(hits.sum()), len(hits)))

    bare = predict(target, before).argmax(1).numpy() == split.labels
    defended = predict(target, after).argmax(1).numpy() == split.labels
    change = (before.astype(float) - split.pixels).reshape(len(before), -1)
    norms = np.linalg.norm(split.pixels.reshape(len(before), -1).astype(float), axis=1)
    relative = np.linalg.norm(change, axis=1) / norms
    row = (
        name,
        share(bare),
        share(defended),
        "-" if floats is None else share(floats == split.labels),
        f"{relative.mean():.3f}",
        share(classes == split.labels),
    )
    return Outcome(name, before, after, row)


def _overview(outcomes: list[Outcome]) -> Pixels:
    rows = []
    for outcome in outcomes:
        rows.append((outcome.name, outcome.before[:PANEL_IMAGES]))
        rows.append(("  purified", outcome.after[:PANEL_IMAGES]))
    return draw_panel(rows)


def _report(outcomes: list[Outcome], summary: dict[str, Any]) -> str:
    lead = (
        f"{summary['images']} images of {len(outcomes)} shards, {summary['images/s']} images/s. "
        "Attacks see the bare target only; attacked images are 8-bit. In brackets: Wilson 95 % intervals."
    )
    table = Table("", "", HEADER, tuple(outcome.row for outcome in outcomes))
    sections = [Section(paragraphs=(lead,), tables=(table,))]
    for outcome in outcomes:
        before, after = outcome.before[:PANEL_IMAGES], outcome.after[:PANEL_IMAGES]
        rows = [
            ("before", before),
            ("purified", after),
            ("change x 5", magnified_difference(after, before)),
        ]
        sections.append(Section(outcome.name, panels=(Panel("Before, purified, change", draw_panel(rows)),)))
    return html_report("ACSR on scikit-learn's digits", sections)


def _forget(output: Path) -> None:
    """Remove an earlier demo's purified shards; the ledger refuses a folder of others."""
    if (output / "_acsr" / "run.json").exists():
        shutil.rmtree(output)
