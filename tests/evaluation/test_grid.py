"""Grids from YAML: what is wrong is said by name, and what is right survives a round trip."""

import copy
from pathlib import Path

import pytest
import yaml

from acsr_ray.config import AcsrError
from acsr_ray.evaluation.grid import Grid, GridError, read_grid

GRIDS = sorted((Path(__file__).parents[2] / "jobs" / "grids").glob("*.yaml"))
CONTENT = {
    "title": "Small",
    "data": [{"name": "toys", "test": ["toys/test.parquet"], "validation": ["toys/val.parquet"]}],
    "targets": [
        {"name": "net", "location": "targets/net"},
        {"name": "other", "location": "targets/other", "source_only": True},
    ],
    "attacks": [
        {
            "name": "FGSM",
            "attack": {"name": "fgsm", "norm": "relative_l2", "epsilon": 0.04},
            "calibrate_to": 0.6,
        },
        {
            "name": "transfer",
            "attack": {"name": "pgd", "epsilon": 0.03},
            "knowledge": "transfer",
            "source": "other",
        },
        {
            "name": "white",
            "attack": {"name": "pgd", "epsilon": 0.03},
            "knowledge": "white_box",
            "defenses": ["none"],
        },
    ],
    "defenses": [
        {"name": "none", "config": {"name": "none"}},
        {"name": "JPEG 75", "config": {"name": "jpeg", "quality": 75}, "family": "JPEG"},
    ],
    "reference": "JPEG",
}


def changed(*path, value):
    """Return the content above with one entry replaced."""
    content = copy.deepcopy(CONTENT)
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return content


def write(folder, content):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_grid_survives_yaml_and_its_own_description(tmp_path):
    grid = read_grid(write(tmp_path, CONTENT))
    assert grid == Grid.model_validate(CONTENT)
    assert Grid.from_description(grid.describe()) == grid
    assert read_grid(write(tmp_path, grid.describe())) == grid
    assert grid.targets_of("toys") == grid.targets[:1]
    assert [defense.group for defense in grid.defenses] == ["none", "JPEG"]
    assert [attack.adaptive for attack in grid.attacks] == [False, False, True]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("titel",), "x", "titel"),
        (("targets", 1, "loaction"), "x", "targets.1.loaction"),
        (("defenses", 1, "config", "qualty"), 50, "did you mean 'quality'"),
        (("attacks", 0, "attack", "steps"), 5, "attacks.0.attack"),
        (("attacks", 1, "attack", "name"), "pdg", "did you mean 'pgd'"),
        (("attacks", 2, "knowledge"), "whitebox", "attacks.2.knowledge"),
        (("targets", 1, "name"), "net", "names must differ: net"),
        (("defenses", 1, "name"), "none", "names must differ: none"),
        (("attacks", 0, "name"), "clean", "may not be called 'clean'"),
        (("attacks", 1, "source"), "othr", "unknown source 'othr', did you mean 'other'"),
        (("attacks", 1, "source"), None, "transfer, and only transfer, has a source"),
        (("attacks", 2, "source"), "net", "transfer, and only transfer, has a source"),
        (("attacks", 2, "calibrate_to"), 0.5, "only gray_box budgets are calibrated"),
        (("attacks", 2, "defenses"), ["JPEG 57"], "unknown defence 'JPEG 57', did you mean 'JPEG 75'"),
        (("data", 0, "validation"), [], "need validation shards"),
        (("data", 0, "test"), [], "data.0.test"),
        (("seeds",), [], "seeds"),
        (("reference",), "JEPG", "unknown reference 'JEPG', did you mean 'JPEG'"),
        (("targets", 0, "data"), ["toy"], "net: unknown data 'toy', did you mean 'toys'"),
        (("defenses", 1, "data"), ["toy"], "JPEG 75: unknown data 'toy'"),
        (("targets", 0, "source_only"), True, "no target or no defence serves data 'toys'"),
        (("layout",), "ranks", "family 'rank'"),
        (("layout",), "rank", "layout"),
    ],
)
def test_errors_name_the_entry_and_the_file(tmp_path, path, value, said):
    with pytest.raises(GridError) as error:
        read_grid(write(tmp_path, changed(*path, value=value)))
    assert said in str(error.value)
    assert "grid.yaml" in str(error.value)


def test_choosing_strengths_needs_validation_shards(tmp_path):
    content = changed("data", 0, "validation", value=[])
    content["attacks"] = []
    read_grid(write(tmp_path, content))
    with pytest.raises(GridError, match="need validation shards"):
        read_grid(write(tmp_path, {**content, "choose": True}))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "title: [", "\x00"])
def test_files_that_hold_no_grid(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(GridError, match=r"grid\.yaml"):
        read_grid(path)
    with pytest.raises(AcsrError, match=r"absent\.yaml"):
        read_grid(tmp_path / "absent.yaml")


def test_data_sets_can_have_their_own_targets_and_defences():
    content = copy.deepcopy(CONTENT)
    content["data"].append({**content["data"][0], "name": "photos"})
    content["targets"][0]["data"] = ["toys"]
    content["targets"].append({"name": "big", "location": "targets/big", "data": ["photos"]})
    content["defenses"][1]["data"] = ["photos"]
    grid = Grid.model_validate(content)
    assert [target.name for target in grid.targets_of("toys")] == ["net"]
    assert [target.name for target in grid.targets_of("photos")] == ["big"]
    assert [defense.name for defense in grid.defenses_of("toys")] == ["none"]
    assert [defense.name for defense in grid.defenses_of("photos")] == ["none", "JPEG 75"]


@pytest.mark.parametrize(
    ("attack", "knowledge", "draws", "random"),
    [
        ({"name": "fgsm", "epsilon": 0.1}, "gray_box", 1, False),
        ({"name": "deepfool"}, "white_box", 1, False),
        ({"name": "pgd", "epsilon": 0.1}, "gray_box", 1, True),
        ({"name": "fgsm", "epsilon": 0.1}, "gray_box", 4, False),
        ({"name": "fgsm", "epsilon": 0.1}, "white_box", 4, False),
        ({"name": "torchattacks.FAB"}, "gray_box", 1, True),
    ],
)
def test_which_attacks_are_repeated(attack, knowledge, draws, random):
    entry = {"name": "x", "attack": attack, "knowledge": knowledge, "eot_samples": draws}
    grid = Grid.model_validate({**CONTENT, "attacks": [entry]})
    assert grid.attacks[0].random is random


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids_load(path):
    assert read_grid(path).attacks


def test_there_are_shipped_grids():
    assert GRIDS
