"""Units of work: a fingerprint changes with what decides its rows, and with nothing else."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.corpus.labelled import read_labelled
from acsr_ray.evaluation.grid import Grid
from acsr_ray.evaluation.plan import load_set, plan_units, unit_chunk

CHUNK = 4
COUNT = 10
CONTENT = {
    "title": "Plan",
    "data": [{"name": "toys", "test": [""], "validation": [""], "image_size": 16}],
    "targets": [{"name": "net", "location": "a"}, {"name": "lender", "location": "b", "source_only": True}],
    "attacks": [
        {"name": "FGSM", "attack": {"name": "fgsm", "epsilon": 0.02}},
        {"name": "PGD", "attack": {"name": "pgd", "epsilon": 0.02, "steps": 3}},
        {
            "name": "transfer",
            "attack": {"name": "pgd", "epsilon": 0.02, "steps": 3},
            "knowledge": "transfer",
            "source": "lender",
        },
        {
            "name": "white",
            "attack": {"name": "pgd", "epsilon": 0.02, "steps": 3},
            "knowledge": "white_box",
            "defenses": ["none", "blur"],
        },
    ],
    "defenses": [
        {"name": "none", "config": {"name": "none"}},
        {"name": "blur", "config": {"name": "gaussian", "sigma": 0.5}},
        {"name": "JPEG", "config": {"name": "jpeg"}},
    ],
    "chunk": CHUNK,
    "choose": True,
}
TARGETS = {"net": "digest of net", "lender": "digest of lender"}
DEFENSES = {"none": "d-none", "blur": "d-blur", "JPEG": "d-jpeg"}


@pytest.fixture
def shards(tmp_path, encoded, smooth_pixels, hf_table, write_parquet):
    """Write a test and a validation shard; `changed` moves one pixel of one test image by one level."""

    def write(changed=None):
        pixels = smooth_pixels(COUNT, 16, 16, 0)
        if changed is not None:
            pixels[changed, 3, 3, 0] ^= 1
        test = write_parquet(tmp_path / "test.parquet", hf_table([encoded(image) for image in pixels]))
        held_out = smooth_pixels(6, 16, 16, 1)
        validation = write_parquet(
            tmp_path / "validation.parquet", hf_table([encoded(image) for image in held_out])
        )
        return str(test), str(validation)

    return write


def grid_of(shards, **changes):
    test, validation = shards
    content = copy.deepcopy({**CONTENT, **changes})
    for data in content["data"]:
        data.update(test=[test], validation=[validation])
    return Grid.model_validate(content)


def loaded(grid):
    sets = []
    for data in grid.data:
        for split in ("test", "validation"):
            sets.append(load_set(data, split, grid.seeds[0], grid.chunk))
    return sets


def plan_of(grid, targets=TARGETS, defenses=DEFENSES, budgets=None):
    sets = loaded(grid)
    return plan_units(grid, sets, targets, defenses, budgets or {}), sets


def attack_keys(plan):
    """Return (attack, defence seen, chunk, seed) of every attack's fingerprint."""
    return {
        unit.fingerprint: (
            unit.attack.name,
            unit.defense.name if unit.defense else None,
            unit.chunk_index,
            unit.seed,
        )
        for unit in plan.attacks
    }


def defend_keys(plan):
    return {
        (
            unit.set_index,
            unit.attack_name,
            unit.defense.name,
            unit.target.name,
            unit.chunk_index,
            unit.seed,
        ): unit.fingerprint
        for unit in plan.defends
    }


def differing(before, after):
    """Return the names of cells whose fingerprint differs between two plans of the same cells."""
    one, two = defend_keys(before), defend_keys(after)
    assert one.keys() == two.keys()
    return {key for key in one if one[key] != two[key]}


def with_attack(index, **changes):
    attacks = copy.deepcopy(CONTENT["attacks"])
    attacks[index]["attack"].update(changes)
    return attacks


def test_validation_is_planned_only_where_strengths_are_chosen_on_it(shards):
    content = shards()
    splits = {}
    for choose in (True, False):
        plan, sets = plan_of(grid_of(content, choose=choose))
        splits[choose] = {sets[unit.set_index].split for unit in plan.defends}
    assert splits == {True: {"test", "validation"}, False: {"test"}}


def test_the_plan_holds_every_cell_once(shards):
    plan, _ = plan_of(grid_of(shards()))
    keys = defend_keys(plan)
    assert len(keys) == len(plan.defends)
    # 3 chunks of test, 2 of validation; 3 attacks on 3 defences and one on 2.
    assert len([key for key in keys if key[1] == "clean"]) == (3 + 2) * 3
    assert len([key for key in keys if key[1] != "clean"]) == 3 * (3 * 3 + 2)
    assert {key[0] for key in keys if key[1] != "clean"} == {0}
    assert len(set(keys.values())) == len(keys)


def test_a_source_only_lends_its_gradients(shards):
    plan, _ = plan_of(grid_of(shards()))
    assert {unit.target.name for unit in plan.defends} == {"net"}
    assert {u.crafted_on.name for u in plan.attacks if u.attack.name == "transfer"} == {"lender"}
    assert {u.crafted_on.name for u in plan.attacks if u.attack.name != "transfer"} == {"net"}


def test_bare_attacks_are_shared_by_all_defences_and_adaptive_ones_are_not(shards):
    plan, _ = plan_of(grid_of(shards()))
    attacks = {unit.fingerprint: unit for unit in plan.attacks}
    readers = {}
    for unit in plan.defends:
        if unit.attacked_by:
            readers.setdefault(unit.attacked_by, []).append(unit)
    assert readers.keys() == attacks.keys()
    for key, units in readers.items():
        names = [unit.defense.name for unit in units]
        assert {unit.chunk_index for unit in units} == {attacks[key].chunk_index}
        if attacks[key].attack.adaptive:
            assert names == [attacks[key].defense.name]
        else:
            assert attacks[key].defense is None
            assert names == ["none", "blur", "JPEG"]


def test_the_same_attack_lent_and_made_is_one_unit(shards):
    grid = grid_of(shards())
    plan, _ = plan_of(grid, targets={"net": "same", "lender": "same"})
    assert len([unit for unit in plan.attacks if unit.attack.name == "transfer"]) == 0


def test_same_inputs_same_units_and_words_change_nothing(shards):
    written = shards()
    before, _ = plan_of(grid_of(written))
    renamed = copy.deepcopy(CONTENT["attacks"])
    for attack in renamed:
        attack["block"] = "another heading"
    changes = {
        "title": "Other",
        "caption": "words",
        "clean_loss": [0.5],
        "reference": "JPEG",
        "layout": "targets",
        "attacks": renamed,
    }
    after, _ = plan_of(grid_of(written, **changes))
    assert differing(before, after) == set()
    assert [unit.fingerprint for unit in before.attacks] == [unit.fingerprint for unit in after.attacks]


def test_names_change_nothing_either(shards):
    written = shards()
    before, _ = plan_of(grid_of(written))
    content = copy.deepcopy(CONTENT)
    content["data"][0]["name"] = "other toys"
    content["attacks"][1]["name"] = "another name"
    after, _ = plan_of(grid_of(written, **content))
    assert [unit.fingerprint for unit in before.defends] == [unit.fingerprint for unit in after.defends]


def test_one_pixel_changes_its_chunk_alone(shards):
    before, _ = plan_of(grid_of(shards()))
    after, _ = plan_of(grid_of(shards(changed=5)))
    assert differing(before, after) == {key for key in defend_keys(before) if key[0] == 0 and key[4] == 1}


def test_a_defence_changes_its_cells_and_the_attacks_that_saw_it(shards):
    grid = grid_of(shards())
    before, _ = plan_of(grid)
    after, _ = plan_of(grid, defenses={**DEFENSES, "blur": "another sigma"})
    assert differing(before, after) == {key for key in defend_keys(before) if key[2] == "blur"}
    gone = [attack_keys(before)[key] for key in attack_keys(before).keys() - attack_keys(after).keys()]
    assert {(name, seen) for name, seen, *_ in gone} == {("white", "blur")}


def test_weights_change_all_that_goes_through_them(shards):
    grid = grid_of(shards())
    before, _ = plan_of(grid)
    own, _ = plan_of(grid, targets={**TARGETS, "net": "trained again"})
    assert differing(before, own) == set(defend_keys(before))
    kept = {attack_keys(before)[key][0] for key in attack_keys(before).keys() & attack_keys(own).keys()}
    assert kept == {"transfer"}
    lent, _ = plan_of(grid, targets={**TARGETS, "lender": "trained again"})
    assert differing(before, lent) == {key for key in defend_keys(before) if key[1] == "transfer"}


@pytest.mark.parametrize(
    ("index", "option", "name"),
    [(0, {"epsilon": 0.03}, "FGSM"), (1, {"steps": 4}, "PGD"), (3, {"restarts": 2}, "white")],
)
def test_an_attacks_option_changes_its_cells_alone(shards, index, option, name):
    written = shards()
    before, _ = plan_of(grid_of(written))
    after, _ = plan_of(grid_of(written, attacks=with_attack(index, **option)))
    assert differing(before, after) == {key for key in defend_keys(before) if key[1] == name}


def test_what_the_attacker_knows_is_part_of_an_adaptive_attack(shards):
    written = shards()
    for change in ({"eot_samples": 3}, {"knowledge": "bpda"}):
        before, _ = plan_of(grid_of(written))
        attacks = copy.deepcopy(CONTENT["attacks"])
        attacks[3].update(change)
        after, _ = plan_of(grid_of(written, attacks=attacks))
        assert {key[1] for key in differing(before, after)} == {"white"}


def test_a_calibrated_budget_takes_the_place_of_the_grids(shards):
    attacks = copy.deepcopy(CONTENT["attacks"])
    attacks[0]["calibrate_to"] = 0.5
    grid = grid_of(shards(), attacks=attacks)
    first = grid.attacks[0].attack
    before, _ = plan_of(grid, budgets={("toys", "net", "FGSM"): first})
    stronger = first.with_epsilon(0.07)
    after, _ = plan_of(grid, budgets={("toys", "net", "FGSM"): stronger})
    assert {key[1] for key in differing(before, after)} == {"FGSM"}
    used = {unit.attack.attack.epsilon for unit in after.attacks if unit.attack.name == "FGSM"}
    assert used == {0.07}


def test_seeds_repeat_only_what_draws_and_add_no_change_to_the_rest(shards):
    written = shards()
    one, _ = plan_of(grid_of(written, seeds=[0]))
    three, _ = plan_of(grid_of(written, seeds=[0, 1, 2]))
    assert defend_keys(one).items() <= defend_keys(three).items()
    seeds = {}
    for name, _, _, seed in attack_keys(three).values():
        seeds.setdefault(name, set()).add(seed)
    assert seeds == {"FGSM": {0}, "PGD": {0, 1, 2}, "transfer": {0, 1, 2}, "white": {0, 1, 2}}
    assert {key[5] for key in defend_keys(three) if key[1] == "clean"} == {0}


def test_a_seen_random_defence_is_drawn_anew_under_every_seed(shards):
    defenses = [*CONTENT["defenses"], {"name": "SHIELD", "config": {"name": "shield"}}]
    attack = {"name": "BPDA", "attack": {"name": "bim", "epsilon": 0.02, "steps": 2}, "knowledge": "bpda"}
    attack["defenses"] = ["blur", "SHIELD"]
    plan, _ = plan_of(
        grid_of(shards(), defenses=defenses, attacks=[attack], seeds=[0, 1]),
        defenses={**DEFENSES, "SHIELD": "d"},
    )
    seeds = {}
    for unit in plan.attacks:
        seeds.setdefault(unit.defense.name, set()).add(unit.seed)
    assert seeds == {"blur": {0}, "SHIELD": {0, 1}}


def test_a_calibrated_attack_without_its_budget_is_not_planned(shards):
    attacks = copy.deepcopy(CONTENT["attacks"])
    attacks[0]["calibrate_to"] = 0.5
    with pytest.raises(KeyError):
        plan_of(grid_of(shards(), attacks=attacks))


def test_a_limit_takes_the_first_images_and_leaves_whole_chunks_in_the_cache(shards):
    written = shards()
    attacks = copy.deepcopy(CONTENT["attacks"])
    attacks[1]["images"] = 6
    free, _ = plan_of(grid_of(written))
    plan, sets = plan_of(grid_of(written, attacks=attacks))
    limited = [unit for unit in plan.attacks if unit.attack.name == "PGD"]
    assert [unit.chunk_index for unit in limited] == [0, 1]
    keys = np.concatenate([unit_chunk(sets, unit).keys for unit in limited])
    np.testing.assert_array_equal(keys, np.arange(6))
    defended = [unit for unit in plan.defends if unit.attack_name == "PGD" and unit.defense.name == "blur"]
    assert [len(unit_chunk(sets, unit)) for unit in defended] == [4, 2]
    shared = {attack_keys(plan)[key] for key in attack_keys(plan).keys() & attack_keys(free).keys()}
    assert ("PGD", None, 0, 0) in shared
    assert ("PGD", None, 1, 0) not in shared


def test_attacks_of_other_limits_differ_in_the_cut_chunk(shards):
    written = shards()
    names = []
    for limit in (5, 6):
        attacks = copy.deepcopy(CONTENT["attacks"])
        attacks[1]["images"] = limit
        plan, _ = plan_of(grid_of(written, attacks=attacks))
        names.append({key for key, cell in attack_keys(plan).items() if cell[0] == "PGD"})
    assert len(names[0] & names[1]) == 1
    assert len(names[0] | names[1]) == 3


def test_data_sets_with_their_own_targets_and_defences(shards):
    content = copy.deepcopy(CONTENT)
    content["data"].append({**content["data"][0], "name": "photos", "images": 3})
    content["targets"].append({"name": "big", "location": "c", "data": ["photos"]})
    content["targets"][0]["data"] = ["toys"]
    content["defenses"][2]["data"] = ["photos"]
    grid = grid_of(shards(), **content)
    plan, sets = plan_of(grid, targets={**TARGETS, "big": "digest of big"})
    pairs = {(sets[u.set_index].data.name, u.target.name, u.defense.name) for u in plan.defends}
    assert pairs == {
        ("toys", "net", "none"),
        ("toys", "net", "blur"),
        ("photos", "big", "none"),
        ("photos", "big", "blur"),
        ("photos", "big", "JPEG"),
    }


@settings(max_examples=25, deadline=None)
@given(chunk=st.integers(1, 25), images=st.none() | st.integers(1, 25), seed=st.integers(0, 3))
def test_chunks_cover_every_chosen_image_once(many, chunk, images, seed):
    data, everything = many
    split = load_set(data.model_copy(update={"images": images}), "test", seed, chunk)
    count = min(images or len(everything), len(everything))
    whole = split.whole()
    assert len(split) == count
    assert all(len(part) == chunk for part in split.chunks[:-1])
    np.testing.assert_array_equal(whole.keys, np.arange(count))
    # Each image is one of the shard's, in the shard's order.
    position = {image.tobytes(): row for row, image in enumerate(everything.pixels)}
    rows = [position[image.tobytes()] for image in whole.pixels]
    assert rows == sorted(set(rows))
    np.testing.assert_array_equal(whole.labels, everything.labels[rows])
    again = load_set(data.model_copy(update={"images": images}), "test", seed, chunk)
    assert again.digests == split.digests


@pytest.fixture(scope="module")
def many(tmp_path_factory, write_shard):
    shard = str(write_shard(tmp_path_factory.mktemp("many") / "test.parquet", count=19))
    content = copy.deepcopy(CONTENT["data"][0])
    content.update(test=[shard], validation=[shard])
    data = Grid.model_validate({**CONTENT, "data": [content]}).data[0]
    return data, read_labelled([shard], 16)


def test_the_draw_depends_on_the_seed_and_validation_has_its_own_number(many):
    data, _ = many
    five = data.model_copy(update={"images": 5, "validation_images": 7})
    drawn = {load_set(five, "test", seed, 10).digests for seed in range(4)}
    assert len(drawn) > 1
    assert len(load_set(five, "validation", 0, 3)) == 7
