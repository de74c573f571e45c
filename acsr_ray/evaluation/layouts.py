"""From results to what people read: tables (Markdown, CSV, LaTeX), figures (PNG, SVG) and one HTML report."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch

from acsr_ray.artifacts import atomic_write
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.corpus.images import encode_png, to_pixels, to_unit_range
from acsr_ray.evaluation.cells import defense_of, stored_pixels
from acsr_ray.evaluation.checks import scene_warnings, unmade_checks
from acsr_ray.evaluation.figures import (
    Reference,
    StrengthCurve,
    TradeOff,
    rank_figure,
    risk_coverage_figure,
    strength_figure,
    tradeoff_figure,
)
from acsr_ray.evaluation.grid import CLEAN, Grid
from acsr_ray.evaluation.panels import draw_panel, magnified_difference
from acsr_ray.evaluation.plan import EvaluationSet
from acsr_ray.evaluation.quality import mean_psnr
from acsr_ray.evaluation.report import Panel, Picture, Section, html_report
from acsr_ray.evaluation.results import Cell, Results
from acsr_ray.evaluation.sanity import SanityWarning
from acsr_ray.evaluation.scenes import ABSENT, NONE, Scene
from acsr_ray.evaluation.statistics import macro_scores, mcnemar, paired_difference, risk_coverage
from acsr_ray.evaluation.summaries import (
    accuracy_table,
    attack_table,
    cost_table,
    equal_clean_table,
    interpolated_table,
    shown_p_value,
    test_table,
)
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


def _defense_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    sections = []
    for scene in scenes:
        if grid.choose:
            tables = (
                *(equal_clean_table(scene, loss) for loss in grid.clean_loss),
                *(interpolated_table(scene, loss) for loss in grid.clean_loss),
            )
            sections.append(
                Section(
                    f"At equal clean accuracy: {scene.title}",
                    tables=tables,
                    figures=tuple(_tradeoffs(scene, output)),
                )
            )
        sections.append(Section(scene.title, tables=tuple(_block_tables([scene]))))
    return sections


def _target_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    return [
        Section(f"Accuracy, {of_data[0].data}", tables=tuple(_block_tables(of_data)))
        for of_data in _by_data(scenes)
    ]


def _filter_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    def scores(of_data: Sequence[Scene], title: str, of: Callable[[Cell], str]) -> Table:
        rows = [
            (scene.target, defense.name, *(ABSENT if cell is None else of(cell) for cell in cells))
            for scene in of_data
            for defense in scene.defenses
            for cells in ([scene.cell(n, defense.name) for n in (CLEAN, *(a.name for a in grid.attacks))],)
        ]
        header = ("target", "defence", CLEAN, *(attack.name for attack in grid.attacks))
        return Table(title, "Mean over the classes that the sample has.", header, tuple(rows))

    def area(cell: Cell) -> str:
        auc = macro_scores(cell.labels, cell.probabilities).auc
        return ABSENT if auc is None else f"{auc:.3f}"

    def f1(cell: Cell) -> str:
        return f"{macro_scores(cell.labels, cell.probabilities).f1:.3f}"

    return [
        Section(
            f"Accuracy, AUC and F1, {of_data[0].data}",
            tables=(
                *_block_tables(of_data),
                scores(of_data, "Macro AUC, one against the rest", area),
                scores(of_data, "Macro F1", f1),
            ),
            figures=tuple(
                Picture(f"Risk and coverage, {scene.title}, {attack.name}", _risk(scene, attack.name, output))
                for scene in of_data
                for attack in grid.attacks[-1:]
            ),
        )
        for of_data in _by_data(scenes)
    ]


def _rank_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    sections = []
    for scene in scenes:
        for attack in grid.attacks:
            ranked = [
                (defense, cell)
                for defense in scene.defenses
                if defense.group == "rank"
                for cell in (scene.cell(attack.name, defense.name),)
                if cell is not None
            ]
            if not ranked:
                continue
            by_rank = [cell for _, cell in ranked]
            others = [
                (defense, cell)
                for defense in scene.defenses
                if defense.group not in ("rank", NONE)
                for cell in (scene.cell(attack.name, defense.name),)
                if cell is not None
            ]
            title = f"{attack.name}, {scene.title}"
            png = rank_figure(
                [cell.accuracy for cell in by_rank],
                [_psnr(cell) for cell in by_rank],
                [Reference(d.name, cell.accuracy, _psnr(cell)) for d, cell in others[:2]],
                title=title,
                svg=_svg(output, title),
            )
            # The next, a middle and the last rank, each once.
            last = len(ranked) - 1
            chosen = dict.fromkeys(rank for rank in (1, len(ranked) // 2, last) if 0 < rank <= last)
            compared = [*others, *(ranked[rank] for rank in chosen)]
            rows = tuple(
                (
                    f"{ranked[0][0].name} (nearest)",
                    other.name,
                    str(by_rank[0].accuracy),
                    str(cell.accuracy),
                    str(paired_difference(by_rank[0].correct, cell.correct)),
                    shown_p_value(mcnemar(by_rank[0].correct, cell.correct).p_value),
                    f"{_psnr(by_rank[0]) - _psnr(cell):+.2f}",
                )
                for other, cell in compared
            )
            header = (
                "defence",
                "against",
                "nearest, %",
                "other, %",
                "difference, points",
                "p",
                "PSNR difference, dB",
            )
            table = Table(f"The core claim: {title}", "Exact McNemar tests, same images.", header, rows)
            sections.append(Section(title, tables=(table,), figures=(Picture(title, png),)))
    return [
        *sections,
        *(
            Section(f"All ranks, {of_data[0].data}", tables=tuple(_block_tables(of_data)))
            for of_data in _by_data(scenes)
        ),
    ]


def _strength_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    sections = []
    for of_data in _by_data(scenes):
        data, curves = of_data[0].data, []
        for scene in of_data:
            for defense in scene.defenses:
                clean = scene.cell(CLEAN, defense.name)
                points = [(0.0, clean.accuracy)] if clean is not None else []
                for attack in grid.attacks:
                    cell = scene.cell(attack.name, defense.name)
                    if cell is not None and attack.attack.epsilon is not None:
                        points.append((attack.attack.epsilon * 255, cell.accuracy))
                curves.append(StrengthCurve(f"{scene.target}: {defense.name}", tuple(points)))
        png = strength_figure(
            curves,
            title=f"{grid.title}: {data}",
            budget_label="linf, /255",
            svg=_svg(output, data),
        )
        tables = tuple(_block_tables(of_data))
        sections.append(Section(data, tables=tables, figures=(Picture(data, png),)))
    return sections


def _adaptive_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    sections = _defense_sections(grid, scenes, output)
    figures = []
    for scene in scenes:
        curves = []
        for defense in scene.defenses:
            points = [
                (attack.attack.epsilon * 255, cell.accuracy)
                for attack in grid.attacks
                if attack.block.startswith("White-box") and attack.attack.epsilon is not None
                for cell in (scene.cell(attack.name, defense.name),)
                if cell is not None
            ]
            if points:
                curves.append(StrengthCurve(defense.name, tuple(points)))
        if curves:
            title = f"White-box strength, {scene.title}"
            svg = _svg(output, title)
            figures.append(
                Picture(title, strength_figure(curves, title=title, budget_label="linf, /255", svg=svg))
            )
    return [*sections, Section("White-box strength", figures=tuple(figures))]


def _panel_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    rows = [
        (scene.target, attack.name, defense.name, f"{_psnr(cell):.2f}", f"{cell.ssim.mean():.3f}")
        for scene in scenes
        for attack in grid.attacks
        for defense in scene.defenses
        for cell in (scene.cell(attack.name, defense.name),)
        if cell is not None
    ]
    header = ("target", "attack", "defence", "PSNR, dB", "SSIM")
    return [
        Section("Fidelity", tables=(Table("PSNR and SSIM against the clean image", "", header, tuple(rows)),))
    ]


LAYOUTS: Mapping[str, Callable[[Grid, Sequence[Scene], Path], list[Section]]] = {
    "defenses": _defense_sections,
    "targets": _target_sections,
    "filter": _filter_sections,
    "ranks": _rank_sections,
    "strengths": _strength_sections,
    "adaptive": _adaptive_sections,
    "panels": _panel_sections,
}


def _by_data(scenes: Sequence[Scene]) -> list[list[Scene]]:
    """Return the scenes of each data set; targets of two may have one name."""
    return [[s for s in scenes if s.data == data] for data in dict.fromkeys(s.data for s in scenes)]


def _block_tables(scenes: Sequence[Scene]) -> Iterator[Table]:
    attacks = scenes[0].grid.attacks
    for block in dict.fromkeys(attack.block for attack in attacks):
        chosen = [attack for attack in attacks if attack.block == block]
        yield accuracy_table(
            scenes, chosen, f"{_scene_names(scenes)}: {block}" if block else _scene_names(scenes)
        )


def _scene_names(scenes: Sequence[Scene]) -> str:
    return scenes[0].title if len(scenes) == 1 else scenes[0].data


def _tradeoffs(scene: Scene, output: Path) -> Iterator[Picture]:
    for attack in scene.grid.attacks:
        lines = []
        for family in dict.fromkeys(defense.group for defense in scene.defenses):
            points = [
                (clean.accuracy, attacked.accuracy)
                for defense in scene.defenses
                if defense.group == family
                for clean, attacked in (
                    (scene.cell(CLEAN, defense.name), scene.cell(attack.name, defense.name)),
                )
                if clean is not None and attacked is not None
            ]
            lines.append(TradeOff(family, tuple(points)))
        title = f"{attack.name}, {scene.title}"
        yield Picture(title, tradeoff_figure(lines, title=title, svg=_svg(output, title)))


def _risk(scene: Scene, attack: str, output: Path) -> bytes:
    curves = {
        defense.name: risk_coverage(cell.correct, cell.confidence)
        for defense in scene.defenses
        for cell in (scene.cell(attack, defense.name),)
        if cell is not None
    }
    title = f"Risk and coverage, {scene.title}, {attack}"
    return risk_coverage_figure(curves, title=title, svg=_svg(output, title))


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


def _psnr(cell: Cell) -> float:
    return mean_psnr(torch.from_numpy(cell.psnr))[0]


def _svg(output: Path, title: str) -> Path:
    return output / "figures" / f"{_slug(title)}.svg"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _save(sections: Sequence[Section], output: Path) -> None:
    names: set[str] = set()
    for section in sections:
        for table in section.tables:
            short = _slug(f"{section.heading} {table.title}")[:120]
            # Long titles may begin alike.
            name, number = short, 1
            while name in names:
                number += 1
                name = f"{short}-{number}"
            names.add(name)
            for suffix, write in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
                atomic_write(output / "tables" / f"{name}.{suffix}", write(table).encode())
        for picture in section.figures:
            atomic_write(output / "figures" / f"{_slug(picture.caption)}.png", picture.png)
        for panel in section.panels:
            path = output / "figures" / f"panel-{_slug(panel.caption)}.png"
            atomic_write(path, encode_png(panel.pixels))
