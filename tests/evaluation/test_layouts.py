"""What people read of a sweep: every layout's files, the choice of strengths, and the warnings."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acsr_ray.corpus.images import encode_png
from acsr_ray.evaluation import layouts
from acsr_ray.evaluation.cells import Chunk
from acsr_ray.evaluation.checks import scene_warnings, unmade_checks
from acsr_ray.evaluation.grid import Grid
from acsr_ray.evaluation.layouts import LAYOUTS
from acsr_ray.evaluation.plan import EvaluationSet
from acsr_ray.evaluation.results import Results
from acsr_ray.evaluation.scenes import Scene
from acsr_ray.evaluation.summaries import (
    accuracy_table,
    attack_table,
    best_rival_table,
    choose_strengths,
    equal_clean_table,
    matched_table,
)
from acsr_ray.evaluation.write_up import Calibration, write_results

IMAGES, SIDE = 200, 16


def gaussian(name, sigma, family=None):
    return {"name": name, "config": {"name": "gaussian", "sigma": sigma}, "family": family}


def pgd(name, levels, **more):
    return {"name": name, "attack": {"name": "pgd", "epsilon": levels / 255}, **more}


NONE = {"name": "none", "config": {"name": "none"}}
NOISE = {"name": "noise", "attack": {"name": "noise", "epsilon": 4 / 255}}
FGSM = {"name": "FGSM", "attack": {"name": "fgsm", "epsilon": 4 / 255}}
SQUARE = {
    "name": "Square",
    "attack": {"name": "square", "epsilon": 4 / 255, "queries": 100},
    "knowledge": "white_box",
}
DEFENSES = [NONE, gaussian("ACSR .5", 0.5, "ACSR"), gaussian("ACSR .8", 0.8, "ACSR"), gaussian("blur", 0.4)]


def grid_of(attacks, defenses=DEFENSES, data=("toys",), **more):
    entry = {"test": ["unused"], "validation": ["unused"], "image_size": SIDE}
    return Grid.model_validate(
        {
            "title": "Synthetic <sweep>",
            "caption": "By hand.",
            "data": [{"name": name, **entry} for name in data],
            "targets": [{"name": "net", "location": "unused"}],
            "attacks": attacks,
            "defenses": defenses,
            **more,
        }
    )


def results_of(grid, accuracies, validation=None):
    """Return outcomes of every cell with given accuracies by (attack, defence); 0.5 where none is given."""
    tables = []
    for data in grid.data:
        for defense in grid.defenses:
            cells = [("test", None), ("validation", None), *(("test", attack) for attack in grid.attacks)]
            for split, attack in cells:
                if attack and attack.defenses is not None and defense.name not in attack.defenses:
                    continue
                name = attack.name if attack else "clean"
                known = accuracies if split == "test" else (validation or {})
                accuracy = known.get((name, defense.name), known.get(name, 0.5))
                count = min(IMAGES, (attack.images if attack else None) or IMAGES)
                tables.append(cell_rows(data.name, split, attack, defense, accuracy, count))
    return Results(pa.concat_tables(tables))


def cell_rows(data, split, attack, defense, accuracy, count):
    keys = np.arange(count)
    correct = keys < round(accuracy * count)
    labels = keys % 3
    predictions = np.where(correct, labels, (labels + 1) % 3)
    probabilities = np.full((count, 3), 0.1)
    probabilities[keys, predictions] = 0.8
    nulls = pa.nulls(count, pa.float32())
    columns = {
        "key": keys,
        "label": labels,
        "prediction": predictions,
        "confidence": 0.5 + 0.4 * correct,
        "probabilities": list(probabilities),
        "psnr": np.full(count, 30.0),
        "ssim": np.full(count, 0.9),
        "seconds": np.full(count, 0.01),
        "float_prediction": pa.array(predictions if attack else [None] * count, pa.int64()),
    }
    for name in ("linf", "l2", "relative_l2", "attack_seconds"):
        columns[name] = pa.array(np.full(count, 0.02, np.float32)) if attack else nulls
    columns["scaled_back"] = pa.array((keys < 50) if attack else [None] * count, pa.bool_())
    words = {
        "data": data,
        "split": split,
        "target": "net",
        "attack": attack.name if attack else "clean",
        "budget": attack.attack.label if attack else None,
        "attacked_by": f"{data}-unit" if attack else None,
        "knowledge": attack.knowledge if attack else None,
        "defense": defense.name,
        "family": defense.group,
    }
    for name, word in words.items():
        columns[name] = pa.array([word] * count, pa.string())
    columns["seed"] = np.zeros(count, np.int64)
    return pa.table(columns)


def sets_of(grid, cache, pixels):
    """Return a set per split and write the attacked images that the pictures are made of."""
    chunk = Chunk(pixels, np.arange(len(pixels)) % 3, np.arange(len(pixels)))
    (cache / "adversarial").mkdir(parents=True, exist_ok=True)
    sets = []
    for data in grid.data:
        images = {
            "image": [encode_png(np.clip(image.astype(int) + 9, 0, 255).astype(np.uint8)) for image in pixels]
        }
        pq.write_table(pa.table(images), cache / "adversarial" / f"{data.name}-unit.parquet")
        sets += [EvaluationSet(data, split, (chunk,), ("d",), ()) for split in ("test", "validation")]
    return sets


def scene_of(grid, accuracies, validation=None):
    return Scene(grid, results_of(grid, accuracies, validation), grid.data[0].name, "net")


def column(table, name):
    """Return a column of a table by the cells of its first."""
    place = table.header.index(name)
    return {row[0]: row[place] for row in table.rows}


RANKS = [
    NONE,
    *(gaussian(f"rank {rank}", 0.3 + rank / 10, "rank") for rank in (1, 2, 3)),
    gaussian("STL", 0.4),
]
BLOCKS = [pgd("PGD 4", 4, block="B1"), pgd("PGD 8", 8, block="White-box budgets", knowledge="white_box")]
KINDS = {
    "defenses": {"attacks": BLOCKS, "choose": True, "reference": "ACSR"},
    "targets": {"attacks": BLOCKS, "data": ("toys", "photos"), "reference": "ACSR"},
    "filter": {"attacks": BLOCKS, "data": ("toys", "photos")},
    "ranks": {"attacks": BLOCKS[:1], "defenses": RANKS},
    "strengths": {"attacks": [pgd("PGD 4", 4), pgd("PGD 8", 8)], "data": ("toys", "photos")},
    "adaptive": {"attacks": BLOCKS, "choose": True},
    "panels": {"attacks": BLOCKS[:1]},
}


def test_every_layout_is_tried():
    assert KINDS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", KINDS)
def test_a_layout_writes_tables_figures_and_the_report(layout, tmp_path, smooth_pixels):
    grid = grid_of(layout=layout, **KINDS[layout])
    sets = sets_of(grid, tmp_path / "cache", smooth_pixels(10, SIDE, SIDE, 0))
    results = results_of(grid, {"clean": 0.93, "PGD 4": 0.715, "PGD 8": 0.41})
    written = write_results(grid, sets, results, tmp_path / "cache", tmp_path / "out")
    page = written.report.read_text()
    assert "Synthetic &lt;sweep&gt;" in page
    assert "By hand." in page
    tables = {path.stem for path in (tmp_path / "out" / "tables").iterdir()}
    for stem in tables:
        for suffix in ("md", "csv", "tex"):
            assert (tmp_path / "out" / "tables" / f"{stem}.{suffix}").stat().st_size > 0
    # Every table of the page is a file of its own.
    assert page.count("<table>") == len(tables)
    pictures = list((tmp_path / "out" / "figures").glob("*.png"))
    figures = [path for path in pictures if not path.name.startswith("panel-")]
    assert page.count('class="figure"') == len(figures)
    assert page.count('class="panel"') == len(pictures) - len(figures)
    # A figure has one name in both formats.
    assert {path.stem for path in figures} == {
        path.stem for path in (tmp_path / "out" / "figures").glob("*.svg")
    }
    assert bool(figures) == (layout not in ("targets", "panels"))
    for path in figures:
        assert path.read_bytes().startswith(b"\x89PNG")
    # Only the family ACSR is shown, and only attacks that any defence may meet.
    bare = [attack for attack in grid.attacks if not attack.adaptive]
    shown = 0 if layout == "ranks" else len(grid.data) * len(bare)
    assert page.count('class="panel"') == shown
    if layout != "panels":
        assert "71.5 [" in page


def test_data_sets_do_not_share_a_row(tmp_path, smooth_pixels):
    grid = grid_of(layout="targets", **KINDS["targets"])
    sets = sets_of(grid, tmp_path, smooth_pixels(3, SIDE, SIDE, 0))
    write_results(grid, sets, results_of(grid, {}), tmp_path, tmp_path)
    accuracies = [path for path in (tmp_path / "tables").glob("accuracy-*.csv") if "-b1" in path.stem]
    assert len(accuracies) == 2
    for path in accuracies:
        rows = list(csv.reader(path.open()))
        assert len({row[0] for row in rows}) == len(rows)


def test_titles_that_begin_alike_get_files_of_their_own(tmp_path, smooth_pixels):
    long = "a defence with a very long name " * 5
    attacks = [pgd("one", 4, block=f"{long}1"), pgd("two", 4, block=f"{long}2")]
    grid = grid_of(attacks, [NONE])
    write_results(
        grid,
        sets_of(grid, tmp_path, smooth_pixels(2, SIDE, SIDE, 0)),
        results_of(grid, {}),
        tmp_path,
        tmp_path,
    )
    heads = [path.read_text().splitlines()[0] for path in (tmp_path / "tables").glob("toys-net*.csv")]
    assert sorted(heads) == ["defence,clean,one", "defence,clean,two"]


def test_strengths_are_chosen_on_validation_alone():
    grid = grid_of([pgd("PGD", 4)], choose=True)
    # On the test split the stronger ACSR would qualify and the blur would not.
    test = {
        ("clean", "none"): 0.99,
        ("clean", "ACSR .5"): 0.99,
        ("clean", "ACSR .8"): 0.99,
        ("clean", "blur"): 0.1,
    }
    held_out = {
        ("clean", "none"): 0.90,
        ("clean", "ACSR .5"): 0.88,
        ("clean", "ACSR .8"): 0.80,
        ("clean", "blur"): 0.89,
    }
    scene = scene_of(grid, {**test, ("PGD", "ACSR .5"): 0.33, ("PGD", "ACSR .8"): 0.66}, held_out)

    def chosen(loss):
        return {choice.family: choice.defense for choice in choose_strengths(scene, loss)}

    assert chosen(0.03) == {"none": "none", "ACSR": "ACSR .5", "blur": "blur"}
    assert chosen(0.11) == {"none": "none", "ACSR": "ACSR .8", "blur": "blur"}
    assert chosen(0.005) == {"none": "none", "ACSR": None, "blur": None}
    table = equal_clean_table(scene, 0.03)
    assert column(table, "PGD")["ACSR"].startswith("33.0")
    assert column(table, "validation clean")["ACSR"] == "88.0"
    assert column(table, "test clean")["blur"].startswith("10.0")
    assert column(equal_clean_table(scene, 0.005), "chosen")["ACSR"] == "none qualifies"


def test_nothing_is_chosen_without_a_bare_accuracy():
    grid = grid_of([pgd("PGD", 4)], DEFENSES[1:])
    assert choose_strengths(scene_of(grid, {}), 0.05) == []


def test_attacks_show_what_they_did_to_what_they_attacked():
    attacks = [
        pgd("gray", 4),
        pgd("only blur", 4, defenses=["blur"]),
        pgd("white", 4, knowledge="white_box", defenses=["ACSR .5", "blur"]),
        pgd("lent", 4, knowledge="transfer", source="net"),
    ]
    accuracies = {
        ("gray", "none"): 0.1,
        ("gray", "blur"): 0.6,
        ("white", "ACSR .5"): 0.2,
        ("white", "blur"): 0.3,
        ("lent", "none"): 0.7,
    }
    rows = attack_table(scene_of(grid_of(attacks), accuracies)).rows
    assert [(row[0], row[2], row[3], row[4].split()[0]) for row in rows] == [
        ("gray", "gray-box", "none", "10.0"),
        ("only blur", "gray-box", "none", "-"),
        ("white", "white-box", "ACSR .5", "20.0"),
        ("white", "white-box", "blur", "30.0"),
        ("lent", "transfer", "none", "70.0"),
    ]
    assert rows[0][1] == "PGD linf 4/255 x20"
    assert rows[4][5] == "-"


WHITE = [pgd(f"white {levels}", levels, knowledge="white_box") for levels in (2, 8, 64)]
STRONG = {"white 2": 0.5, "white 8": 0.2, "white 64": 0.0}
WARNINGS = {
    "noise is harmless": ([NOISE], {"clean": 0.9, "noise": 0.89}, set()),
    "noise does harm": ([NOISE], {"clean": 0.9, ("noise", "blur"): 0.6, "noise": 0.9}, {("noise", "blur")}),
    "budgets tell": (WHITE, STRONG, set()),
    "budgets do not": (WHITE, {**STRONG, ("white 8", "ACSR .5"): 0.8}, {("budget", "ACSR .5")}),
    "a huge one leaves some": (WHITE, {**STRONG, ("white 64", "blur"): 0.2}, {("huge_budget", "blur")}),
    "no huge one": (WHITE[:1] + WHITE[1:2], STRONG, {("huge_budget", d["name"]) for d in DEFENSES}),
    "Square loses": ([SQUARE, pgd("w", 4, knowledge="white_box")], {"Square": 0.5, "w": 0.3}, set()),
    "Square wins": (
        [SQUARE, pgd("w", 4, knowledge="white_box")],
        {("Square", "ACSR .8"): 0.1, "Square": 0.6, "w": 0.5},
        {("black_box", "ACSR .8")},
    ),
    "Square of another budget": (
        [SQUARE, pgd("w", 2, knowledge="white_box")],
        {"Square": 0.1, "w": 0.5},
        set(),
    ),
    "Square wins bare": (
        [{**SQUARE, "knowledge": "gray_box"}, pgd("gray", 4)],
        {"Square": 0.1, "gray": 0.5},
        {("black_box", "none")},
    ),
    "many steps win": ([FGSM, pgd("gray", 4)], {"FGSM": 0.5, "gray": 0.1}, set()),
    "one step wins": ([FGSM, pgd("gray", 4)], {"FGSM": 0.1, "gray": 0.5}, {("one_step", "bare")}),
    "a weak transfer is no sign": (
        [FGSM, pgd("lent", 4, knowledge="transfer", source="net")],
        {"FGSM": 0.1, "lent": 0.9},
        set(),
    ),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_warnings_come_when_they_should(case):
    attacks, accuracies, expected = WARNINGS[case]
    scene = scene_of(grid_of(attacks), {"clean": 0.9, **accuracies})
    found = list(scene_warnings(scene))
    named = {
        (warning.name, defense)
        for warning in found
        for defense in (*(d["name"] for d in DEFENSES), "bare")
        if f"net, {defense}:" in warning.message or f"net, {defense}, " in warning.message
    }
    assert named == expected
    assert len(found) == len(expected)


def test_square_on_fewer_images_is_compared_on_those():
    fewer = {**SQUARE, "images": 50}
    attacks = [fewer, pgd("w", 4, knowledge="white_box")]
    # The white-box attack leaves the first images standing and takes the rest.
    scene = scene_of(grid_of(attacks, [NONE]), {"clean": 0.9, "Square": 0.2, "w": 0.25})
    assert {warning.name for warning in scene_warnings(scene)} == {"black_box"}


def test_the_report_shows_its_warnings(tmp_path, smooth_pixels):
    grid = grid_of([NOISE])
    sets = sets_of(grid, tmp_path, smooth_pixels(4, SIDE, SIDE, 0))
    written = write_results(grid, sets, results_of(grid, {"clean": 0.9, "noise": 0.3}), tmp_path, tmp_path)
    assert {warning.name for warning in written.warnings} == {"noise"}
    assert 'class="warnings"' in written.report.read_text()
    quiet = write_results(grid, sets, results_of(grid, {"clean": 0.9, "noise": 0.9}), tmp_path, tmp_path)
    assert quiet.warnings == ()
    assert 'class="warnings"' not in quiet.report.read_text()


def test_the_reference_meets_the_rival_of_nearest_validation_accuracy():
    defenses = [*DEFENSES, gaussian("fog .1", 0.1, "fog"), gaussian("fog .2", 0.2, "fog")]
    validation = {
        ("clean", "ACSR .5"): 0.88,
        ("clean", "ACSR .8"): 0.80,
        ("clean", "blur"): 0.70,
        ("clean", "fog .1"): 0.87,
        ("clean", "fog .2"): 0.81,
    }
    # On the test split fog .2 would be the nearest to both; that must not matter.
    accuracies = {
        ("clean", "ACSR .5"): 0.88,
        ("clean", "ACSR .8"): 0.86,
        ("clean", "fog .1"): 0.70,
        ("clean", "fog .2"): 0.87,
        ("PGD", "ACSR .5"): 0.60,
        ("PGD", "fog .1"): 0.40,
        ("PGD", "fog .2"): 0.95,
    }
    grid = grid_of([pgd("PGD", 4)], defenses, reference="ACSR")
    table = matched_table(Scene(grid, results_of(grid, accuracies, validation), "toys", "net"), "ACSR")
    pairs = [row[:2] for row in table.rows]
    assert pairs == [
        ("ACSR .5", "blur"),
        ("ACSR .5", "fog .1"),
        ("ACSR .8", "blur"),
        ("ACSR .8", "fog .2"),
    ]
    shown = dict(zip(pairs, table.rows, strict=True))
    assert shown["ACSR .5", "fog .1"][2].startswith("+18.0 [+")
    assert shown["ACSR .5", "fog .1"][3].startswith("+20.0 [+")
    assert shown["ACSR .8", "fog .2"][3].startswith("-45.0 [-")


def test_the_best_rival_is_of_those_as_accurate_on_validation_and_of_each_attack_its_own():
    defenses = [*DEFENSES, gaussian("fog .1", 0.1, "fog"), gaussian("fog .2", 0.2, "fog")]
    clean = {"none": 0.99, "ACSR .5": 0.80, "ACSR .8": 0.95, "blur": 0.80, "fog .1": 0.90, "fog .2": 0.79}
    under = {
        # `none` is no rival, and fog .2 costs more than ACSR .5 does.
        "PGD": {"none": 0.9, "ACSR .5": 0.60, "blur": 0.30, "fog .1": 0.40, "fog .2": 0.95},
        "FGSM": {"none": 0.9, "ACSR .5": 0.60, "blur": 0.70, "fog .1": 0.40, "fog .2": 0.95},
    }
    accuracies = {(attack, name): value for attack, found in under.items() for name, value in found.items()}
    validation = {("clean", name): value for name, value in clean.items()}
    grid = grid_of([pgd("PGD", 4), FGSM], defenses, reference="ACSR")
    scene = Scene(grid, results_of(grid, accuracies, validation), "toys", "net")
    weak, strong = best_rival_table(scene, "ACSR").rows
    assert weak[0] == "ACSR .5"
    assert weak[2].startswith("+20.0 [+")
    assert weak[2].endswith("(fog .1)")
    assert weak[3].startswith("-10.0 [-")
    assert weak[3].endswith("(blur)")
    # Nothing else keeps as much.
    assert strong == ("ACSR .8", "-", "-", "-")


@pytest.mark.parametrize(("near", "chosen"), [((0.87, 0.89), "fog .2"), ((0.89, 0.87), "fog .1")])
def test_of_two_equally_near_rivals_the_more_accurate_is_met(near, chosen):
    defenses = [*DEFENSES[:2], gaussian("fog .1", 0.1, "fog"), gaussian("fog .2", 0.2, "fog")]
    grid = grid_of([], defenses, reference="ACSR")
    validation = {
        ("clean", "ACSR .5"): 0.88,
        ("clean", "fog .1"): near[0],
        ("clean", "fog .2"): near[1],
    }
    scene = Scene(grid, results_of(grid, {}, validation), "toys", "net")
    assert [row[1] for row in matched_table(scene, "ACSR").rows] == [chosen]


def test_curves_are_drawn_by_kind_of_attack_and_only_of_several_budgets(tmp_path, smooth_pixels):
    attacks = [
        pgd("1", 1, knowledge="white_box"),
        pgd("2", 2, knowledge="white_box"),
        pgd("gray 4", 4),
        {"name": "l2", "attack": {"name": "pgd", "norm": "l2", "epsilon": 0.5}, "knowledge": "white_box"},
        {"name": "l2 1", "attack": {"name": "pgd", "norm": "l2", "epsilon": 1.0}, "knowledge": "white_box"},
        SQUARE,
    ]
    grid = grid_of(attacks, layout="adaptive")
    sets = sets_of(grid, tmp_path, smooth_pixels(3, SIDE, SIDE, 0))
    written = write_results(grid, sets, results_of(grid, {"clean": 0.9}), tmp_path, tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out" / "figures").glob("white-box*.png")}
    assert names == {
        "white-box-strength-toys-net-pgd-linf-white-box",
        "white-box-strength-toys-net-pgd-l2-white-box",
    }
    assert (
        "linf, /255"
        in (tmp_path / "out/figures/white-box-strength-toys-net-pgd-linf-white-box.svg").read_text()
    )
    assert written.report.exists()


def test_fewer_images_are_said_in_the_column():
    grid = grid_of([pgd("PGD", 4, images=50), pgd("other", 8)])
    table = accuracy_table([scene_of(grid, {})], grid.attacks, "t")
    assert table.header == ("defence", "clean", "PGD (first 50 images)", "other")
    assert "By hand." in table.caption


def test_a_missed_calibration_is_a_warning_and_a_row(tmp_path, smooth_pixels):
    grid = grid_of([pgd("PGD", 4)])
    sets = sets_of(grid, tmp_path / "cache", smooth_pixels(10, SIDE, SIDE, 0))
    calibrations = [
        Calibration("toys", "net", "DF", "DeepFool l2rel .08", 0.16, 0.16, ""),
        Calibration("toys", "net", "CW", "CW l2rel .08", 0.09, 0.4, "unbounded, the attack is too weak"),
    ]
    out = tmp_path / "out"
    written = write_results(grid, sets, results_of(grid, {}), tmp_path / "cache", out, calibrations)
    assert [warning.message for warning in written.warnings if warning.name == "calibration"] == [
        "toys, net, CW: wanted 9.0 %, the nearest is 40.0 % at CW l2rel .08: "
        "unbounded, the attack is too weak"
    ]
    (path,) = (out / "tables").glob("calibrated*.csv")
    with path.open() as file:
        rows = list(csv.reader(file))
    assert [row[-1] for row in rows[1:]] == ["reached", "unbounded, the attack is too weak"]


def test_checks_that_could_not_be_made_are_named():
    grid = grid_of([pgd("PGD", 4)])
    (text,) = unmade_checks([scene_of(grid, {})])
    for missing in ("noise of linf 0.0157", "fewer than two budgets", "no Square"):
        assert missing in text
    loud = {"name": "loud", "attack": {"name": "noise", "epsilon": 0.2}}
    whole = grid_of([loud, SQUARE, *WHITE])
    assert unmade_checks([scene_of(whole, {})]) == ()


def test_noise_smaller_than_the_attack_checks_nothing():
    grid = grid_of([NOISE, pgd("PGD", 4), pgd("stronger", 8), pgd("huge", 80)])
    (text,) = unmade_checks([scene_of(grid, {})])
    assert "noise of linf 0.0314 is harmless" in text
    louder = {"name": "louder", "attack": {"name": "noise", "epsilon": 8 / 255}}
    grid = grid_of([NOISE, louder, pgd("PGD", 4), pgd("stronger", 8), pgd("huge", 80)])
    (text,) = unmade_checks([scene_of(grid, {})])
    assert "noise" not in text


def test_results_outside_the_budget_are_told():
    grid = grid_of([pgd("PGD", 4)])
    table = attack_table(scene_of(grid, {}))
    # A quarter of the synthetic rows, for each defence the same attack.
    assert dict(zip(table.header, table.rows[0], strict=True))["scaled back, %"] == "25"


def test_every_rank_is_tested_against_the_nearest(tmp_path):
    grid = grid_of([pgd("PGD", 4)], RANKS, layout="ranks")
    (section, *_) = LAYOUTS["ranks"](grid, [scene_of(grid, {})], tmp_path)
    others = [row[1] for row in section.tables[0].rows]
    ranks = [defense["name"] for defense in RANKS if defense.get("family") == "rank"]
    assert [name for name in others if name in ranks] == ranks[1:]


def test_strengths_are_levels_of_255_in_linf_and_plain_in_l2(tmp_path, monkeypatch):
    drawn = {}

    def record(curves, *, title, budget_label, svg):
        drawn[title] = (budget_label, [[budget for budget, _ in curve.points] for curve in curves])
        return b""

    monkeypatch.setattr(layouts, "strength_figure", record)
    far = [{"name": f"l2 {e}", "attack": {"name": "pgd", "norm": "l2", "epsilon": e}} for e in (0.5, 1.0)]
    for attacks in ([pgd("2", 2), pgd("8", 8), *far], [pgd("2", 2), pgd("8", 8), far[0]]):
        grid = grid_of(attacks, [NONE], layout="strengths")
        LAYOUTS["strengths"](grid, [scene_of(grid, {})], tmp_path)
    two = {title: found for title, found in drawn.items() if "pgd" in title}
    assert {label: points for label, points in two.values()} == {
        "linf, /255": [[0, pytest.approx(2), pytest.approx(8)]],
        "l2": [[0, 0.5, 1.0]],
    }
    # One kind alone needs no name.
    assert drawn["Synthetic <sweep>: toys"][0] == "linf, /255"
