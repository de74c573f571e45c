"""From results to what people read: tables (Markdown, CSV, LaTeX), figures (PNG, SVG) and one HTML report."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from acsr_ray.artifacts import atomic_write
from acsr_ray.attacks.rounding import round_to_pixels
from acsr_ray.corpus.images import to_pixels, to_unit_range
from acsr_ray.evaluation.cells import defense_of, stored_pixels
from acsr_ray.evaluation.figures import (
    Reference,
    StrengthCurve,
    TradeOff,
    rank_figure,
    risk_coverage_figure,
    strength_figure,
    tradeoff_figure,
)
from acsr_ray.evaluation.grid import CLEAN, Grid, SweepAttack, SweepDefense
from acsr_ray.evaluation.intervals import Share
from acsr_ray.evaluation.panels import draw_panel, magnified_difference
from acsr_ray.evaluation.plan import EvaluationSet
from acsr_ray.evaluation.report import Panel, Picture, Section, html_report
from acsr_ray.evaluation.results import Cell, Results
from acsr_ray.evaluation.sanity import (
    SanityWarning,
    check_black_box,
    check_budgets,
    check_noise,
    check_one_step,
    check_purified_clean,
)
from acsr_ray.evaluation.statistics import macro_scores, mcnemar, paired_difference, risk_coverage
from acsr_ray.evaluation.tables import Table, to_csv, to_latex, to_markdown

NONE = "none"
ABSENT = "-"
PANEL_IMAGES = 8
HUGE_LINF = 0.25
"""From this linf radius on, an iterative white-box attack must leave next to nothing."""
ITERATIVE = ("bim", "pgd", "apgd")
SEEING = ("white_box", "white_box_fixed", "bpda")


@dataclass(frozen=True)
class Written:
    """What `write_results` left behind."""

    report: Path
    warnings: tuple[SanityWarning, ...]


@dataclass(frozen=True)
class Scene:
    """One (data, target) of a sweep with its cells."""

    grid: Grid
    results: Results
    data: str
    target: str

    def cell(self, attack: str, defense: str, split: str = "test") -> Cell | None:
        """Return a cell of this data set and target."""
        return self.results.get(self.data, self.target, attack, defense, split)

    @property
    def title(self) -> str:
        """What the scene is called."""
        return f"{self.data}, {self.target}"

    @property
    def defenses(self) -> tuple[SweepDefense, ...]:
        """Defences that serve the data set."""
        return self.grid.defenses_of(self.data)


def write_results(
    grid: Grid, sets: Sequence[EvaluationSet], results: Results, cache: Path, output: Path
) -> Written:
    """Write every table and figure of a sweep and the report.

    Args:
        grid: the sweep.
        sets: its loaded splits, for the pictures.
        results: its outcomes.
        cache: folder with `adversarial/`, for the pictures.
        output: folder; `tables/`, `figures/` and `report.html` are written there.
    """
    scenes = [
        Scene(grid, results, data.name, target.name)
        for data in grid.data
        for target in grid.targets_of(data.name)
    ]
    warnings = tuple(warning for scene in scenes for warning in scene_warnings(scene))
    sections = [
        Section("What this is", paragraphs=(_lead(grid, sets),), warnings=warnings),
        *LAYOUTS[grid.layout](grid, scenes, output),
        Section("What the attacks did", tables=tuple(map(attack_table, scenes)) if grid.attacks else ()),
        Section("What the defences cost", tables=tuple(map(cost_table, scenes))),
    ]
    if grid.reference:
        tests = tuple(test_table(scene, grid.reference) for scene in scenes)
        sections.append(Section(f"Paired tests against {grid.reference}", tables=tests))
    sections.append(Section("Before and after", panels=tuple(_panels(grid, scenes, sets, cache))))
    _save(sections, output)
    report = output / "report.html"
    atomic_write(report, html_report(grid.title, sections).encode())
    return Written(report, warnings)


def accuracy_table(
    scenes: Sequence[Scene], attacks: Sequence[SweepAttack], title: str, caption: str = ""
) -> Table:
    """Return accuracies with 95 % intervals: a row per target and defence, a column per attack."""
    several = len({scene.title for scene in scenes}) > 1
    rows = []
    for scene in scenes:
        for defense in scene.defenses:
            cells = [scene.cell(name, defense.name) for name in (CLEAN, *(a.name for a in attacks))]
            if all(cell is None for cell in cells[1:]) and len(cells) > 1:
                continue
            label = (scene.target, defense.name) if several else (defense.name,)
            rows.append((*label, *(ABSENT if cell is None else str(cell.accuracy) for cell in cells)))
    first = ("target", "defence") if several else ("defence",)
    header = (*first, CLEAN, *(attack.name for attack in attacks))
    return Table(title, caption or "Accuracy in percent with Wilson 95 % interval.", header, tuple(rows))


def attack_table(scene: Scene) -> Table:
    """Return what each attack did to the bare target, or to the pipeline that it attacked."""
    rows = []
    for attack in scene.grid.attacks:
        cells = [
            (defense.name, cell)
            for defense in scene.defenses
            for cell in (scene.cell(attack.name, defense.name),)
            if cell is not None
        ]
        # What does not see the defence is one attack for all of them.
        for name, cell in cells if attack.adaptive else cells[:1]:
            shown = cell if attack.adaptive else scene.cell(attack.name, NONE)
            # Unrounded images were shown to the source alone.
            floats = ABSENT if attack.knowledge == "transfer" else str(cell.float_accuracy)
            rows.append(
                (
                    attack.name,
                    cell.budget,
                    attack.knowledge.replace("_", "-"),
                    name if attack.adaptive else NONE,
                    ABSENT if shown is None else str(shown.accuracy),
                    floats,
                    f"{np.median(cell.relative_l2):.4f}",
                    f"{np.median(cell.l2):.3f}",
                    f"{255 * np.max(cell.linf):.1f}",
                    f"{cell.attack_seconds * 1000:.0f}",
                )
            )
    header = (
        "attack",
        "budget",
        "attacker sees",
        "defence seen",
        "accuracy left, 8-bit",
        "accuracy left, float",
        "median relative l2",
        "median l2",
        "largest linf, /255",
        "ms/image",
    )
    caption = "Attacked images count as 8-bit pixels; the float column is before rounding, first strength."
    return Table(f"Attacks on {scene.title}", caption, header, tuple(rows))


def cost_table(scene: Scene) -> Table:
    """Return what each defence does to clean images, and how fast."""
    rows = []
    for defense in scene.defenses:
        cell = scene.cell(CLEAN, defense.name)
        if cell is None:
            continue
        finite = cell.psnr[np.isfinite(cell.psnr)]
        rows.append(
            (
                defense.name,
                str(cell.accuracy),
                f"{finite.mean():.1f}" if len(finite) else "unchanged",
                f"{cell.ssim.mean():.3f}",
                f"{risk_coverage(cell.correct, cell.confidence).aurc:.3f}",
                f"{1 / cell.seconds:.0f}" if cell.seconds else ABSENT,
            )
        )
    header = ("defence", "clean accuracy", "PSNR, dB", "SSIM", "AURC", "images/s per task")
    caption = (
        "PSNR and SSIM of defended clean images; images/s of defence and classifier together; AURC, the "
        "area under the risk-coverage curve, smaller is better."
    )
    return Table(f"Defences on clean images of {scene.title}", caption, header, tuple(rows))


def test_table(scene: Scene, reference: str) -> Table:
    """Return exact McNemar tests of the reference family's defences against every other defence.

    Each defence of the reference family is compared with the others by attack, on the same images.
    """
    own = [defense for defense in scene.defenses if defense.group == reference]
    rows = []
    for attack in (CLEAN, *(a.name for a in scene.grid.attacks)):
        for mine in own:
            first = scene.cell(attack, mine.name)
            for other in scene.defenses:
                second = scene.cell(attack, other.name)
                if first is None or second is None or other.group == reference:
                    continue
                test = mcnemar(first.correct, second.correct)
                difference = paired_difference(first.correct, second.correct)
                rows.append(
                    (
                        attack,
                        mine.name,
                        other.name,
                        str(difference),
                        str(test.only_first),
                        str(test.only_second),
                        _p_value(test.p_value),
                    )
                )
    header = ("attack", "defence", "against", "difference, points", "only first", "only second", "p")
    caption = "Exact McNemar tests on the same images, not corrected for their number."
    return Table(f"{reference} against the others, {scene.title}", caption, header, tuple(rows))


@dataclass(frozen=True)
class Choice:
    """The defence of a family that is chosen on the validation split, None where none qualifies."""

    family: str
    defense: str | None
    validation: Share | None


def choose_strengths(scene: Scene, loss: float) -> list[Choice]:
    """Return each family's strongest defence that loses no more clean accuracy than `loss` on validation.

    The strongest is the one with the lowest clean accuracy that still qualifies. No test image is looked at.
    """
    bare = scene.cell(CLEAN, NONE, "validation")
    if bare is None:
        return []
    choices = []
    for family in dict.fromkeys(defense.group for defense in scene.defenses):
        cells = [
            (defense.name, cell)
            for defense in scene.defenses
            if defense.group == family
            for cell in (scene.cell(CLEAN, defense.name, "validation"),)
            if cell is not None and cell.accuracy.value >= bare.accuracy.value - loss - 1e-9
        ]
        if cells:
            name, cell = min(cells, key=lambda entry: entry[1].accuracy.value)
            choices.append(Choice(family, name, cell.accuracy))
        else:
            choices.append(Choice(family, None, None))
    return choices


def equal_clean_table(scene: Scene, loss: float) -> Table:
    """Return the families at their chosen strengths, with each attack's test accuracy."""
    rows = []
    attacks = scene.grid.attacks
    for choice in choose_strengths(scene, loss):
        if choice.defense is None or choice.validation is None:
            rows.append((choice.family, "none qualifies", *[ABSENT] * (len(attacks) + 2)))
            continue
        cells = [scene.cell(name, choice.defense) for name in (CLEAN, *(a.name for a in attacks))]
        rows.append(
            (
                choice.family,
                choice.defense,
                f"{100 * choice.validation.value:.1f}",
                *(ABSENT if cell is None else str(cell.accuracy) for cell in cells),
            )
        )
    header = ("family", "chosen", "validation clean", "test clean", *(attack.name for attack in attacks))
    caption = (
        f"In each family the strongest defence that costs at most {100 * loss:g} points of clean accuracy on "
        "the validation split. Accuracy in percent on the test split, Wilson 95 % intervals."
    )
    return Table(
        f"At most {100 * loss:g} points of clean accuracy, {scene.title}", caption, header, tuple(rows)
    )


def scene_warnings(scene: Scene) -> Iterator[SanityWarning]:
    """Run the sanity checks of METHOD on one (data, target)."""
    grid = scene.grid
    defended, clean = [], []
    for defense in scene.defenses:
        label = f"{scene.title}, {defense.name}"
        unharmed = scene.cell(CLEAN, defense.name)
        if unharmed is not None:
            clean.append((scene.target, defense.name))
        for attack in grid.attacks:
            cell = scene.cell(attack.name, defense.name)
            if cell is None:
                continue
            defended.append((scene.target, defense.name))
            if attack.attack.name == "noise" and unharmed is not None:
                yield from check_noise(label, unharmed.head(cell.images).accuracy, cell.accuracy)
        yield from _budget_warnings(scene, defense.name, label)
        yield from _black_box_warnings(scene, defense.name, label)
    yield from _one_step_warnings(scene)
    yield from check_purified_clean(defended, clean)


def _budget_warnings(scene: Scene, defense: str, label: str) -> Iterator[SanityWarning]:
    series: dict[tuple[str, str], list[tuple[float, Share]]] = {}
    for attack in scene.grid.attacks:
        config, cell = attack.attack, scene.cell(attack.name, defense)
        white = _sees_all(attack, defense)
        iterative = config.name in ITERATIVE and config.norm == "linf" and config.epsilon is not None
        if cell is not None and white and iterative and config.epsilon is not None:
            points = series.setdefault((config.name, attack.knowledge), [])
            points.append((config.epsilon, cell.accuracy))
    for (name, knowledge), points in series.items():
        if len(points) > 1:
            yield from check_budgets(f"{label}, {name} {knowledge}", points, huge=HUGE_LINF)


def _sees_all(attack: SweepAttack, defense: str) -> bool:
    """Return whether the attack has gradients of all that classifies; without a defence, gray box does."""
    return attack.knowledge in SEEING or (attack.knowledge == "gray_box" and defense == NONE)


def _black_box_warnings(scene: Scene, defense: str, label: str) -> Iterator[SanityWarning]:
    for square in scene.grid.attacks:
        black = scene.cell(square.name, defense)
        if square.attack.name != "square" or black is None:
            continue
        rivals = [
            cell.head(black.images)
            for attack in scene.grid.attacks
            for cell in (scene.cell(attack.name, defense),)
            if cell is not None
            and attack.attack.name in ITERATIVE
            and _sees_all(attack, defense)
            and (attack.attack.norm, attack.attack.epsilon) == (square.attack.norm, square.attack.epsilon)
            and len(cell) >= len(black)
        ]
        if rivals:
            strongest = min(rivals, key=lambda cell: cell.accuracy.value)
            yield from check_black_box(label, strongest.accuracy, black.accuracy)


def _one_step_warnings(scene: Scene) -> Iterator[SanityWarning]:
    for one in scene.grid.attacks:
        if one.attack.name != "fgsm" or one.calibrate_to is not None:
            continue
        for many in scene.grid.attacks:
            same = (many.attack.norm, many.attack.epsilon) == (one.attack.norm, one.attack.epsilon)
            if not same or many.attack.name not in ITERATIVE or many.calibrate_to is not None:
                continue
            if _sees_all(one, NONE) and _sees_all(many, NONE):
                first, second = scene.cell(one.name, NONE), scene.cell(many.name, NONE)
                if first is not None and second is not None and len(first) == len(second):
                    yield from check_one_step(f"{scene.title}, bare", first.accuracy, second.accuracy)


def _defense_sections(grid: Grid, scenes: Sequence[Scene], output: Path) -> list[Section]:
    sections = []
    for scene in scenes:
        if grid.choose:
            tables = tuple(equal_clean_table(scene, loss) for loss in grid.clean_loss)
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
                [_mean_psnr(cell) for cell in by_rank],
                [Reference(d.name, cell.accuracy, _mean_psnr(cell)) for d, cell in others[:2]],
                title=title,
                svg=_svg(output, f"ranks {title}"),
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
                    _p_value(mcnemar(by_rank[0].correct, cell.correct).p_value),
                    f"{_mean_psnr(by_rank[0]) - _mean_psnr(cell):+.2f}",
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
            svg=_svg(output, f"strength {data}"),
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
        (scene.target, attack.name, defense.name, f"{_mean_psnr(cell):.2f}", f"{cell.ssim.mean():.3f}")
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
        yield Picture(title, tradeoff_figure(lines, title=title, svg=_svg(output, f"tradeoff {title}")))


def _risk(scene: Scene, attack: str, output: Path) -> bytes:
    curves = {
        defense.name: risk_coverage(cell.correct, cell.confidence)
        for defense in scene.defenses
        for cell in (scene.cell(attack, defense.name),)
        if cell is not None
    }
    title = f"{attack}, {scene.title}"
    return risk_coverage_figure(curves, title=title, svg=_svg(output, f"risk {title}"))


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


def _lead(grid: Grid, sets: Sequence[EvaluationSet]) -> str:
    counts = ", ".join(f"{len(loaded)} {loaded.split} images of {loaded.data.name}" for loaded in sets)
    seeds = ", ".join(map(str, grid.seeds))
    return (
        f"{grid.caption} {counts}; seeds {seeds}. In brackets: Wilson 95 % intervals. Attacked and defended "
        "images are 8-bit before they are classified. Accuracy over several seeds counts an image only if it "
        "is right under each."
    )


def _mean_psnr(cell: Cell) -> float:
    finite = cell.psnr[np.isfinite(cell.psnr)]
    return float(finite.mean()) if len(finite) else float("nan")


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


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
