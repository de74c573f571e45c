"""The write-up of a sweep: tables (Markdown, CSV, LaTeX), figures (PNG, SVG) and one offline HTML report."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch

from acsr_ray.artifacts import atomic_write
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.corpus.images import encode_png, to_pixels, to_unit_range
from acsr_ray.evaluation.cells import defense_of, stored_pixels
from acsr_ray.evaluation.checks import scene_warnings, unmade_checks
from acsr_ray.evaluation.grid import Grid
from acsr_ray.evaluation.layouts import LAYOUTS, slug
from acsr_ray.evaluation.panels import draw_panel, magnified_difference
from acsr_ray.evaluation.plan import EvaluationSet
from acsr_ray.evaluation.report import Panel, Section, html_report
from acsr_ray.evaluation.results import Results
from acsr_ray.evaluation.sanity import SanityWarning
from acsr_ray.evaluation.scenes import ABSENT, Scene
from acsr_ray.evaluation.summaries import attack_table, cost_table, test_table
from acsr_ray.evaluation.tables import Table, to_csv, to_latex, to_markdown

PANEL_IMAGES = 8


@dataclass(frozen=True)
class Calibration:
    """Outcome of one calibration (B0), on the validation split.

    `wanted` and `reached` are accuracies of the bare target; `note` says why they differ, if they do.
    """

    data: str
    target: str
    attack: str
    budget: str
    wanted: float
    reached: float
    note: str


@dataclass(frozen=True)
class Written:
    """What `write_results` left behind."""

    report: Path
    warnings: tuple[SanityWarning, ...]


def write_results(
    grid: Grid,
    sets: Sequence[EvaluationSet],
    results: Results,
    cache: Path,
    output: Path,
    calibrations: Sequence[Calibration] = (),
) -> Written:
    """Write every table and figure of a sweep and the report.

    Args:
        grid: the sweep.
        sets: its loaded splits, for the pictures.
        results: its outcomes.
        cache: folder with `adversarial/`, for the pictures.
        output: folder; `tables/`, `figures/` and `report.html` are written there.
        calibrations: how budgets were found.
    """
    scenes = [
        Scene(grid, results, data.name, target.name)
        for data in grid.data
        for target in grid.targets_of(data.name)
    ]
    warnings = (
        *(warning for scene in scenes for warning in scene_warnings(scene)),
        *(_missed(one) for one in calibrations if one.note),
    )
    sections = [
        Section("What this is", paragraphs=(_lead(grid, sets), *unmade_checks(scenes)), warnings=warnings),
        *LAYOUTS[grid.layout](grid, scenes, output),
        Section("What the attacks did", tables=tuple(map(attack_table, scenes)) if grid.attacks else ()),
        Section("What the defences cost", tables=tuple(map(cost_table, scenes))),
    ]
    if calibrations:
        sections.append(Section("Calibrated budgets", tables=(_calibration_table(calibrations),)))
    if grid.reference:
        tests = tuple(test_table(scene, grid.reference) for scene in scenes)
        sections.append(Section(f"Paired tests against {grid.reference}", tables=tests))
    sections.append(Section("Before and after", panels=tuple(_panels(grid, scenes, sets, cache))))
    _save(sections, output)
    report = output / "report.html"
    atomic_write(report, html_report(grid.title, sections).encode())
    return Written(report, warnings)


def _panels(
    grid: Grid, scenes: Sequence[Scene], sets: Sequence[EvaluationSet], cache: Path
) -> Iterator[Panel]:
    """Yield before-and-after pictures of the first images: clean, attacked, defended, and the change."""
    for scene in scenes:
        shown = [d for d in scene.defenses if d.group == (grid.reference or "ACSR")][:1]
        chunk = next(s for s in sets if s.data.name == scene.data and s.split == "test").chunks[0]
        clean = chunk.pixels[:PANEL_IMAGES]
        for attack in grid.attacks:
            cell = scene.cell(attack.name, shown[0].name) if shown else None
            if attack.adaptive or cell is None:
                continue
            path = cache / "adversarial" / f"{cell.first_file}.parquet"
            attacked = stored_pixels(pq.read_table(path, columns=["image"]).slice(0, PANEL_IMAGES))
            with torch.no_grad():
                defended = defense_of(shown[0].config, "cpu")(torch.from_numpy(to_unit_range(attacked)))
            after = to_pixels(round_to_pixels(defended).numpy())
            rows = [
                ("clean", clean[: len(after)]),
                ("attacked", attacked),
                ("attack x 5", magnified_difference(attacked, clean[: len(after)])),
                (shown[0].name[:16], after),
                ("left x 5", magnified_difference(after, clean[: len(after)])),
            ]
            yield Panel(f"{attack.name}, {scene.title}", draw_panel(rows, scale=max(1, 96 // clean.shape[1])))


def _missed(one: Calibration) -> SanityWarning:
    text = (
        f"{one.data}, {one.target}, {one.attack}: wanted {100 * one.wanted:.1f} %, the nearest is "
        f"{100 * one.reached:.1f} % at {one.budget}: {one.note}"
    )
    return SanityWarning("calibration", text)


def _calibration_table(calibrations: Sequence[Calibration]) -> Table:
    rows = tuple(
        (
            one.data,
            one.target,
            one.attack,
            one.budget,
            ABSENT if math.isnan(one.wanted) else f"{100 * one.wanted:.1f}",
            f"{100 * one.reached:.1f}",
            one.note or "reached",
        )
        for one in calibrations
    )
    header = ("data", "target", "attack", "budget", "wanted, %", "validation, %", "outcome")
    return Table("Budgets", "Accuracy left of the bare target, on the validation split.", header, rows)


def _lead(grid: Grid, sets: Sequence[EvaluationSet]) -> str:
    counts = ", ".join(f"{len(loaded)} {loaded.split} images of {loaded.data.name}" for loaded in sets)
    seeds = ", ".join(map(str, grid.seeds))
    return (
        f"{grid.caption} {counts}; seeds {seeds}. In brackets: Wilson 95 % intervals. Attacked and defended "
        "images are 8-bit before they are classified. Accuracy over several seeds counts an image only if it "
        "is right under each."
    )


def _save(sections: Sequence[Section], output: Path) -> None:
    names: set[str] = set()
    for section in sections:
        for table in section.tables:
            short = slug(f"{section.heading} {table.title}")[:120]
            # Long titles may begin alike.
            name, number = short, 1
            while name in names:
                number += 1
                name = f"{short}-{number}"
            names.add(name)
            for suffix, write in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
                atomic_write(output / "tables" / f"{name}.{suffix}", write(table).encode())
        for picture in section.figures:
            atomic_write(output / "figures" / f"{slug(picture.caption)}.png", picture.png)
        for panel in section.panels:
            path = output / "figures" / f"panel-{slug(panel.caption)}.png"
            atomic_write(path, encode_png(panel.pixels))
