"""Presets of the paper's tables: they build, and what is missing comes with commands that parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from acsr_ray.cli import ENTRY_POINTS
from acsr_ray.config import parse_job
from acsr_ray.evaluation.encoder_recipes import ENCODERS, encoder_arguments
from acsr_ray.evaluation.grid import Grid, GridError
from acsr_ray.evaluation.presets import PRESETS, preset_grid
from acsr_ray.evaluation.recipes import Place, find_splits, needed_artifacts

ROOT = Path(__file__).parents[2]
VARIANTS = ("small", "full")
DATA = ("cifar10", "imagenet10-64", "imagenet10-128", "moderation5")


@pytest.fixture
def place(tmp_path, request):
    """Folders with empty shards and no artifact."""
    for name in DATA:
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for shard in ("train-00000", "train-00001", "validation-00000", "test-00000"):
            (folder / f"{shard}.parquet").touch()
    variant = getattr(request, "param", "small")
    return Place(variant, tmp_path / "data", tmp_path / "artifacts", "cifar10-small")


def publish(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").touch()


def build(name, place):
    return preset_grid(name, place.variant, place.data, place.artifacts, place.bundle)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("place", VARIANTS, indirect=True)
def test_every_preset_builds_once_its_artifacts_are_there(name, place):
    for folder in needed_artifacts(PRESETS[name](place), place):
        publish(folder)
    grid = build(name, place)
    assert Grid.from_description(grid.describe()) == grid
    assert any(defense.config.name == "none" for defense in grid.defenses)
    for data in grid.data:
        assert set(data.test).isdisjoint(data.validation)
        if place.variant == "full":
            assert data.images is None
        else:
            assert data.images is not None
    for attack in grid.attacks:
        served = {defense.name for defense in grid.defenses}
        assert set(attack.defenses or ()) <= served


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("place", VARIANTS, indirect=True)
def test_commands_for_what_is_missing_parse_and_make_all_of_it(name, place, monkeypatch):
    monkeypatch.chdir(ROOT)
    needed = needed_artifacts(PRESETS[name](place), place)
    assert needed
    with pytest.raises(GridError) as error:
        build(name, place)
    first, *commands = str(error.value).splitlines()
    assert name in first
    assert commands
    made = set()
    for command in commands:
        program, script, *arguments = shlex.split(command)
        assert program == "python"
        job = re.fullmatch(r"jobs/(\w+)\.py", script)[1]
        assert (ROOT / script).is_file()
        module, settings, _ = ENTRY_POINTS[job]
        parsed = parse_job(getattr(importlib.import_module(module), settings), job, arguments)
        made.add(str(parsed.output))
        for shard in getattr(parsed, "train", ()):
            assert Path(shard).name.startswith("train-")
            assert Path(shard).is_relative_to(place.data)
    assert {str(path) for path in needed} <= made


def test_what_is_there_needs_no_command(place):
    needed = needed_artifacts(PRESETS["table 3"](place), place)
    for folder in needed[:-1]:
        publish(folder)
    with pytest.raises(GridError) as error:
        build("table 3", place)
    assert str(needed[-1]) in str(error.value)
    assert not any(str(folder) in str(error.value) for folder in needed[:-1])


def test_rows_of_table_1_that_are_compared_differ_by_the_rst_term_alone(place):
    for plain, rst in (("pgdat-random", "rst-random"), ("pgdat", "pgdat-rst")):
        (job, first, needed), (_, second, same) = (
            encoder_arguments(place.encoder(name), place.small) for name in (plain, rst)
        )
        assert job == "train_robust"
        assert needed == same
        changed = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
        assert changed == [("0", "0.1")]
    starts = [recipe.start for recipe in ENCODERS.values()]
    assert [start for start in starts if start] == ["pgdat-random", "pgdat-random", "trades"]
    # Each can be trained when its turn comes.
    order = list(ENCODERS)
    assert all(order.index(r.start) < order.index(name) for name, r in ENCODERS.items() if r.start)


def test_controls_stand_in_every_table_of_the_purifier(place):
    kinds = {"stl", "random_cluster", "dct_atoms", "random_atoms", "low_band", "gaussian", "jpeg"}
    for name in ("table 2", "table 3", "table 4", "table 4-128", "table 5", "figure 3", "table graybox"):
        grid = PRESETS[name](place)
        for data in grid.data:
            assert kinds | {"none"} <= {defense.config.name for defense in grid.defenses_of(data.name)}


def test_what_is_random_in_the_adaptive_table_is_averaged(place):
    grid = PRESETS["table adaptive"](place)
    knowledge = {attack.knowledge for attack in grid.attacks}
    assert {"gray_box", "transfer", "bpda", "white_box", "low_frequency", "selection"} <= knowledge
    assert all(attack.eot_samples > 1 for attack in grid.attacks if attack.knowledge == "bpda")
    assert max(attack.attack.epsilon for attack in grid.attacks) > 0.25


SPLITS = [
    (("train-0", "train-1", "validation-0", "test-0"), (2, ["validation-0"], ["test-0"])),
    (("train-0", "val-0", "test-0"), (1, ["val-0"], ["test-0"])),
    (("train-0", "train-1", "val-0"), (1, ["train-1"], ["val-0"])),
    (("train-0", "train-1", "test-0", "test-1"), (1, ["train-1"], ["test-0", "test-1"])),
]


@pytest.mark.parametrize(("names", "expected"), SPLITS)
def test_splits_of_a_folder(tmp_path, names, expected):
    for name in (*names, "notes"):
        (tmp_path / f"{name}.parquet").touch()
    train, validation, test = find_splits(tmp_path)
    assert len(train) == expected[0]
    assert [Path(path).stem for path in validation] == expected[1]
    assert [Path(path).stem for path in test] == expected[2]
    assert set(train).isdisjoint([*validation, *test])


@pytest.mark.parametrize("names", [(), ("train-0", "test-0"), ("train-0", "train-1"), ("test-0", "val-0")])
def test_folders_without_a_split_say_how_to_make_it(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(GridError, match=r"jobs/prepare_corpus\.py"):
        find_splits(tmp_path)


def made_by(name, place, artifact):
    """Return the parsed settings of the command that makes an artifact of a preset."""
    with pytest.raises(GridError) as error:
        build(name, place)
    for command in str(error.value).splitlines()[1:]:
        _, script, *arguments = shlex.split(command)
        job = Path(script).stem
        module, settings, _ = ENTRY_POINTS[job]
        parsed = parse_job(getattr(importlib.import_module(module), settings), job, arguments)
        if parsed.output == artifact:
            return parsed
    raise AssertionError(f"no command makes {artifact}")


@pytest.mark.parametrize("place", VARIANTS, indirect=True)
def test_the_pretrained_target_differs_from_the_other_in_its_start_alone(place, monkeypatch):
    monkeypatch.chdir(ROOT)
    scratch = made_by("table 3", place, place.target("cifar10", "vgg16"))
    pretrained = made_by("table 3", place, place.target("cifar10", "vgg16", "-pre"))
    assert pretrained.init_weights == place.target("imagenet10-64", "vgg16")
    assert scratch.init_weights is None
    same = {"output": scratch.output, "init_weights": None}
    assert pretrained.model_copy(update=same) == scratch


@pytest.mark.parametrize(
    ("place", "steps"), [("small", (2500, 8000)), ("full", (3000, 6000))], indirect=["place"]
)
def test_rivals_of_the_small_tables_are_those_that_were_measured(place, steps, monkeypatch):
    monkeypatch.chdir(ROOT)
    magnet = made_by("table 3", place, place.defense("cifar10", "magnet"))
    pixel_cnn = made_by("table 3", place, place.defense("cifar10", "pixel-cnn"))
    assert (magnet.magnet.steps, pixel_cnn.pixel_cnn.steps) == steps


def test_captions_name_the_bundles_that_purify(place):
    for name, bundles in {
        "table 3": "bundle cifar10-small.",
        "table 4": "bundle imagenet10-small.",
        "table 5": "bundle cifar10-small.",
        "figure 4": "bundle cifar10-small, imagenet10-small.",
    }.items():
        assert bundles in PRESETS[name](place).caption
