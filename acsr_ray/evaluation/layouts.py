"""What each kind of sweep shows: from its scenes to the sections of a report, by `Grid.layout`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from acsr_ray.attacks.threat import Norm
from acsr_ray.evaluation.figures import (
    Reference,
    StrengthCurve,
    TradeOff,
    rank_figure,
    risk_coverage_figure,
    strength_figure,
    tradeoff_figure,
)
from acsr_ray.evaluation.grid import CLEAN, Grid, SweepAttack
from acsr_ray.evaluation.intervals import Share
from acsr_ray.evaluation.quality import mean_psnr
from acsr_ray.evaluation.report import Picture, Section
from acsr_ray.evaluation.results import Cell
from acsr_ray.evaluation.scenes import ABSENT, NONE, Scene
from acsr_ray.evaluation.statistics import macro_scores, mcnemar, paired_difference, risk_coverage
from acsr_ray.evaluation.summaries import (
    accuracy_table,
    best_rival_table,
    equal_clean_table,
    matched_table,
    shown_p_value,
)
from acsr_ray.evaluation.tables import Table


def _defense_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    sections = []
    for scene in scenes:
        if grid.choose:
            chosen = [equal_clean_table(scene, loss) for loss in grid.clean_loss]
            matched = []
            if grid.reference:
                matched = [matched_table(scene, grid.reference), best_rival_table(scene, grid.reference)]
            sections.append(
                Section(
                    f"At equal clean accuracy: {scene.title}",
                    tables=(*chosen, *matched),
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
    by_attack = [_rank_section(scene, attack.name, output) for scene in scenes for attack in grid.attacks]
    return [
        *(section for section in by_attack if section is not None),
        *(
            Section(f"All ranks, {of_data[0].data}", tables=tuple(_block_tables(of_data)))
            for of_data in _by_data(scenes)
        ),
    ]


def _rank_section(scene: Scene, attack: str, output: Path) -> Section | None:
    """Show all clusters' dictionaries by rank and test the nearest against the others; None: no ranks."""
    title = f"{attack}, {scene.title}"
    met = [
        (defense, cell)
        for defense in scene.defenses
        for cell in (scene.cell(attack, defense.name),)
        if cell is not None
    ]
    ranked = [(defense.name, cell) for defense, cell in met if defense.group == "rank"]
    if not ranked:
        return None
    others = [(defense.name, cell) for defense, cell in met if defense.group not in ("rank", NONE)]
    png = rank_figure(
        [cell.accuracy for _, cell in ranked],
        [_psnr(cell) for _, cell in ranked],
        [Reference(name, cell.accuracy, _psnr(cell)) for name, cell in others[:2]],
        title=title,
        svg=_svg(output, title),
    )
    table = _nearest_table(title, ranked[0], [*others, *ranked[1:]])
    return Section(title, tables=(table,), figures=(Picture(title, png),))


def _nearest_table(title: str, nearest: tuple[str, Cell], others: Sequence[tuple[str, Cell]]) -> Table:
    name, first = nearest
    rows = tuple(
        (
            f"{name} (nearest)",
            other,
            str(first.accuracy),
            str(cell.accuracy),
            str(paired_difference(first.correct, cell.correct)),
            shown_p_value(mcnemar(first.correct, cell.correct).p_value),
            f"{_psnr(first) - _psnr(cell):+.2f}",
        )
        for other, cell in others
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
    return Table(f"The core claim: {title}", "Exact McNemar tests, same images.", header, rows)


def _strength_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    return [
        Section(
            of_data[0].data,
            tables=tuple(_block_tables(of_data)),
            figures=tuple(
                _strength_pictures(grid.attacks, of_data, f"{grid.title}: {of_data[0].data}", output)
            ),
        )
        for of_data in _by_data(scenes)
    ]


def _adaptive_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    seeing = [attack for attack in grid.attacks if attack.knowledge == "white_box"]
    figures = [
        picture
        for scene in scenes
        for picture in _strength_pictures(seeing, [scene], f"White-box strength, {scene.title}", output)
    ]
    return [
        *_defense_sections(grid, scenes, output),
        Section("White-box strength", figures=tuple(figures)),
    ]


def _strength_pictures(
    attacks: Sequence[SweepAttack], scenes: Sequence[Scene], title: str, output: Path
) -> Iterator[Picture]:
    """Yield a picture of accuracy by budget for each kind of attack that has several budgets."""
    kinds: dict[tuple[str, Norm, str], list[SweepAttack]] = {}
    for attack in attacks:
        config = attack.attack
        if config.epsilon is not None and attack.calibrate_to is None:
            kinds.setdefault((config.name, config.norm, attack.knowledge), []).append(attack)
    several = {kind: found for kind, found in kinds.items() if len({a.attack.epsilon for a in found}) > 1}
    for (name, norm, knowledge), found in several.items():
        curves = [
            StrengthCurve(f"{scene.target}: {defense.name}" if len(scenes) > 1 else defense.name, points)
            for scene in scenes
            for defense in scene.defenses
            for points in (_strengths(scene, defense.name, found),)
            # One point beside the clean one is no curve.
            if len(points) > 2
        ]
        if curves:
            seen = "" if knowledge == "gray_box" else f" {knowledge.replace('_', ' ')}"
            full = title if len(several) == 1 else f"{title}, {name} {norm}{seen}"
            label = f"{norm.replace('_', ' ')}{', /255' if norm == 'linf' else ''}"
            png = strength_figure(curves, title=full, budget_label=label, svg=_svg(output, full))
            yield Picture(full, png)


def _strengths(scene: Scene, defense: str, attacks: Sequence[SweepAttack]) -> tuple[tuple[float, Share], ...]:
    clean = scene.cell(CLEAN, defense)
    points = {} if clean is None else {0.0: clean.accuracy}
    for attack in attacks:
        cell, epsilon = scene.cell(attack.name, defense), attack.attack.epsilon
        if cell is not None and epsilon is not None:
            points[epsilon * (255 if attack.attack.norm == "linf" else 1)] = cell.accuracy
    return tuple(sorted(points.items()))


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


def _psnr(cell: Cell) -> float:
    return mean_psnr(torch.from_numpy(cell.psnr))[0]


def _svg(output: Path, title: str) -> Path:
    return output / "figures" / f"{slug(title)}.svg"


def slug(text: str) -> str:
    """Return a title as a file name: lower case, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
