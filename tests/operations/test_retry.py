"""A retry does again just the units it is asked for, keeps all others byte for byte, and loses no row."""

from pathlib import Path

import pytest

from acsr_ray.cli import run_job
from acsr_ray.config import ConfigError, FailedError
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.ledger import Ledger
from acsr_ray.corpus.removals import RemovalError
from acsr_ray.corpus.retry_request import BY_CHANCE, raised_limits
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.plan import PlanSettings, plan
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.operations.retry import RetrySettings, retry
from acsr_ray.operations.verify import VerifySettings, verify_output
from acsr_ray.storage import StorageError


def purify(options, **changes):
    return purify_corpus(PurifyCorpusSettings.model_validate({**options, **changes}))


def again(options, *reasons, **changes):
    """Retry, with the settings of the output."""
    fields = {"output": options["output"], "bundle": options["bundle"], "reason": reasons, **changes}
    return retry(RetrySettings.model_validate(fields))


def files(options):
    """Return inode and time of every visible file: one that was written again has others."""
    found = (Path(options["output"]) / "data").iterdir()
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def clean(options):
    found = verify_output(VerifySettings(output=options["output"], input=options["input"]))
    return found["problems"] == []


def slow(*numbers):
    """Refuse some images as a decoder does that is short of time."""
    return lambda data, settings: "decoder_timeout" if int(data.split()[1]) in numbers else None


def small_side(data, settings):
    """Refuse every seventh image unless the limit was raised, and every ninth in any case."""
    number = int(data.split()[1])
    if number % 7 == 3:
        return None if settings.decode.max_side > 20_000 else "too_large"
    return "decode_error" if number % 9 == 8 else None


def test_only_units_with_the_reason_are_done_again(options, stage, visible):
    stage.refuses = slow(5, 14, 15)
    purify(options)
    before, rows = files(options), visible(options["output"])
    stage.refuses, stage.units[:] = slow(14), []
    summary = again(options)
    assert stage.done == [("part-0", 4), ("part-1", 4)]
    assert summary["retry"] == {
        "number": 1,
        "reasons": sorted(BY_CHANCE),
        "units": 2,
        "quarantined before": {"decoder_timeout": 3},
        "quarantined now": {"decoder_timeout": 1},
    }
    after = files(options)
    kept = before.keys() & after.keys()
    assert len(kept) == 7
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    told = visible(options["output"])
    assert told == rows | {5: (b"image 5", None), 15: (b"image 15", None)}
    assert clean(options)
    assert not list((Path(options["output"]) / "_acsr" / "ready").glob("*"))


def test_after_a_retry_nothing_is_left_to_do(options, source, stage, visible):
    stage.refuses = slow(5)
    purify(options)
    stage.refuses = slow()
    again(options)
    after = files(options)
    stage.units.clear()
    assert "nothing to do" in purify(options)["this run"]
    # Nor where a shard is only touched, so that its units are planned anew.
    for path in source.iterdir():
        path.touch()
    assert "nothing to do" in purify(options)["this run"]
    assert again(options)["retry"]["units"] == 0
    assert not stage.units
    assert files(options) == after


def test_a_second_retry_of_a_unit_has_a_name_of_its_own(options, stage, visible):
    stage.refuses = slow(5, 6)
    purify(options)
    stage.refuses = slow(6)
    again(options)
    stage.refuses = slow()
    assert again(options)["retry"]["number"] == 2
    assert visible(options["output"])[6] == (b"image 6", None)
    assert clean(options)


def test_raised_limits_give_what_a_run_from_nothing_gives(options, stage, visible, tmp_path, write_numbers):
    stage.refuses = small_side
    purify(options)
    before = files(options)
    raised = {"decode": {"max_side": 30_000}}
    stage.units.clear()
    summary = again(options, **raised)
    assert summary["retry"]["quarantined before"]["too_large"] == 4
    assert "too_large" not in summary["retry"]["quarantined now"]
    assert stage.done == [("part-0", 0), ("part-1", 0), ("part-1", 4), ("part-2", 4)]
    after = files(options)
    assert len(before.keys() & after.keys()) == 5
    assert {name: after[name] for name in before.keys() & after.keys()}.items() <= before.items()
    # From now on the limits are those of the output.
    stage.units.clear()
    assert "nothing to do" in purify(options, **raised)["this run"]
    with pytest.raises(CorpusError, match="max_side"):
        purify(options)
    write_numbers(Path(options["input"], "part-3.parquet"), range(30, 34))
    purify(options, **raised)
    assert stage.done == [("part-3", 0)]
    fresh = {**options, "output": str(tmp_path / "fresh")}
    purify(fresh, **raised)
    assert visible(options["output"]) == visible(fresh["output"])
    assert clean(options)


def test_other_reasons_are_left_alone(options, stage, visible):
    stage.refuses = small_side
    purify(options)
    stage.units.clear()
    again(options, "decode_error")
    assert stage.done == [("part-0", 8), ("part-2", 4)]


def test_limits_lowered_again_make_all_anew_under_other_names(options, stage, visible):
    stage.refuses = small_side
    purify(options)
    again(options, decode={"max_side": 30_000})
    wide = files(options)
    stage.units.clear()
    purify(options, anew=True)
    assert len(stage.units) == 9
    assert not wide.keys() & files(options).keys()
    assert visible(options["output"])[3] == (None, "too_large")
    stage.units.clear()
    assert "nothing to do" in purify(options)["this run"]
    assert clean(options)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strength": 2.0}, "strength"),
        ({"unit_rows": 5}, "unit_rows: 4 -> 5"),
        ({"keep_original": True}, "keep_original"),
        ({"decode": {"max_side": 100}}, "not lower them: decode.max_side is 16384"),
        ({"reason": ("solver_fallback",)}, "by its low band alone"),
        ({"reason": ("bad",)}, "no row is quarantined for bad"),
        ({"anew": True}, "neither --anew"),
    ],
)
def test_what_a_retry_cannot_do_is_refused(options, stage, changes, told):
    purify(options)
    before = files(options)
    with pytest.raises((CorpusError, ConfigError), match=told):
        again(options, **changes)
    assert files(options) == before
    assert Ledger(options["output"]).binding.retry_order() is None


def test_there_must_be_something_to_retry(options, stage, tmp_path):
    with pytest.raises(CorpusError, match="nothing was purified"):
        again(options, input=options["input"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(CorpusError, match="--output is needed"):
        retry(RetrySettings())


def test_limits_are_not_raised_over_a_run_that_did_not_end(options, stage):
    """Its units would be taken as made under the new limits."""

    def stop(unit):
        if unit.relative == "part-1" and unit.first == 4:
            raise KeyboardInterrupt

    stage.before_unit = stop
    with pytest.raises(KeyboardInterrupt):
        purify(options)
    with pytest.raises(CorpusError, match="did not end and left 4 units"):
        again(options, decode={"max_side": 30_000})


def test_failed_units_are_tried_again_and_nothing_else(options, source, stage, visible, write_numbers):
    stage.fails = lambda unit: "given_up" if unit.relative == "part-1" and unit.first > 0 else None
    with pytest.raises(FailedError, match="2 units failed"):
        purify(options)
    write_numbers(source / "part-3.parquet", range(30, 34))
    (source / "part-0.parquet").unlink()
    stage.fails, stage.units[:] = lambda unit: None, []
    again(options)
    assert stage.done == [("part-1", 4), ("part-1", 8)]
    # What is new or gone is for the next run.
    assert sorted(visible(options["output"])) == list(range(30))
    purify(options)
    assert sorted(visible(options["output"])) == list(range(10, 34))


def planned(options, **changes):
    """Plan where nothing is to do, which needs no sample and no Ray; return images to do and states."""
    found = plan(PlanSettings.model_validate({**options, **changes}))
    return found["images_to_do"], {state: count for state, count in found["shard_states"].items() if count}


def test_a_plan_knows_what_a_retry_with_raised_limits_did(options, stage):
    stage.refuses = small_side
    purify(options)
    raised = {"decode": {"max_side": 30_000}}
    again(options, **raised)
    assert planned(options, **raised) == (0, {"unchanged": 3})


def test_a_plan_with_a_limit_knows_what_a_retry_did(options, stage):
    stage.refuses = slow(5, 14)
    # Two whole shards: only hashing would tell of one that a limit cuts.
    purify(options, limit=20)
    stage.refuses = slow()
    assert again(options, limit=20)["retry"]["units"] == 2
    assert planned(options, limit=20) == (0, {"unchanged": 2})


def test_a_plan_for_a_folder_knows_what_a_retry_did(options, stage, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(b"image %d" % number)
    options = {**options, "input": str(folder)}
    stage.refuses = slow(5)
    purify(options)
    stage.refuses = slow()
    assert again(options)["retry"]["units"] == 1
    assert planned(options) == (0, {"unchanged": 1})


def test_a_plan_refuses_what_a_run_would_because_too_much_is_gone(options, source, stage, write_numbers):
    purify(options)
    share = {"max_removed_share": 0.1}
    settings = PlanSettings.model_validate({**options, **share})
    assert plan(settings)["refused"] is None
    for change in ((source / "part-1.parquet").unlink, lambda: write_numbers(source / "part-1.parquet", [])):
        change()
        found = plan(settings)
        with pytest.raises(RemovalError) as refusal:
            purify(options, **share)
        assert found["refused"] == str(refusal.value)
        assert [problem["code"] for problem in found["problems"]] == ["output_refused"]


def test_failed_units_that_were_done_since_are_not_tried_again(options, source, stage, write_numbers):
    stage.fails = lambda unit: "given_up" if unit.relative == "part-1" and unit.first > 0 else None
    with pytest.raises(FailedError):
        purify(options)
    stage.fails = lambda unit: None
    purify(options)
    # A retry that opened the shard would do what is new in it, which is for the next run.
    write_numbers(source / "part-1.parquet", range(50, 60))
    stage.units.clear()
    again(options)
    assert not stage.units


def test_a_shard_of_which_nothing_was_done_is_tried_again(options, stage, visible):
    stage.fails = lambda unit: "given_up" if unit.relative == "part-1" else None
    with pytest.raises(FailedError):
        purify(options)
    stage.fails = lambda unit: None
    again(options)
    assert sorted(visible(options["output"])) == list(range(30))


def test_what_fails_again_stays_as_it_was(options, stage, visible):
    stage.refuses = slow(1, 5)
    purify(options)
    rows = visible(options["output"])
    stage.refuses = slow()
    stage.fails = lambda unit: "stage" if unit.first == 4 else None
    with pytest.raises(FailedError, match="1 units failed"):
        again(options)
    assert visible(options["output"]) == rows | {1: (b"image 1", None)}
    assert clean(options)
    assert not Ledger(options["output"]).binding.retry_order().is_open
    stage.fails = lambda unit: None
    again(options)
    assert visible(options["output"])[5] == (b"image 5", None)


def test_a_changed_shard_is_left_to_the_next_run(options, source, stage, visible, write_numbers):
    stage.refuses = slow(5, 15)
    purify(options)
    write_numbers(source / "part-1.parquet", range(100, 110))
    stage.refuses, stage.units[:] = slow(), []
    summary = again(options)
    assert summary["changed shards left to the next run"] == ["part-1"]
    assert stage.done == [("part-0", 4)]
    assert sorted(visible(options["output"])) == list(range(30))
    purify(options)
    assert sorted(visible(options["output"])) == [*range(10), *range(20, 30), *range(100, 110)]


def test_units_that_were_halved_are_found_again(options, stage, visible):
    def fails(unit):
        return "too_large" if unit.num_rows > 2 else None

    stage.fails, stage.refuses = fails, slow(5)
    purify(options)
    assert len(files(options)) == 15
    before = files(options)
    stage.refuses, stage.units[:] = slow(), []
    again(options)
    assert stage.done == [("part-0", 4)]
    assert len(before.keys() & files(options).keys()) == 14
    assert visible(options["output"])[5] == (b"image 5", None)
    assert clean(options)


def test_a_retried_unit_may_turn_out_too_large(options, stage, visible):
    stage.refuses = slow(5)
    purify(options)
    stage.refuses = slow()
    stage.fails = lambda unit: "too_large" if unit.first == 4 and unit.num_rows > 2 else None
    again(options)
    assert visible(options["output"])[5] == (b"image 5", None)
    assert clean(options)
    # The halves are known when the shard is planned again.
    Path(options["input"], "part-0.parquet").touch()
    before = files(options)
    purify(options)
    assert files(options) == before


def test_a_stop_is_gone_on_with_under_the_same_number(options, stage, visible):
    stage.refuses = slow(5, 15, 25)
    purify(options)
    stage.refuses, stage.units[:] = slow(15), []

    def stop(unit):
        if unit.relative == "part-2":
            raise StorageError("busy")

    stage.before_unit = stop
    with pytest.raises(StorageError):
        again(options, wave_units=1)
    assert stage.done == [("part-0", 4), ("part-1", 4), ("part-2", 4)]
    order = Ledger(options["output"]).binding.retry_order()
    assert (order.number, order.is_open) == (1, True)
    stage.before_unit, stage.units[:] = lambda unit: None, []
    again(options)
    assert stage.done == [("part-2", 4)]
    told = visible(options["output"])
    assert [told[key][1] for key in (5, 15, 25)] == [None, "decoder_timeout", None]
    assert not Ledger(options["output"]).binding.retry_order().is_open


def test_a_run_between_a_stop_and_its_end_keeps_what_was_committed(options, source, stage, visible, caplog):
    stage.refuses = slow(5, 6, 15)
    purify(options)
    stage.refuses = slow()

    def stop(unit):
        if unit.relative == "part-1":
            raise StorageError("busy")

    stage.before_unit = stop
    with pytest.raises(StorageError):
        again(options)
    stage.before_unit = lambda unit: None
    stage.units.clear()
    assert "nothing to do" in purify(options)["this run"]
    assert "retry 1 of" in caplog.text
    assert visible(options["output"])[5] == (b"image 5", None)
    again(options)
    assert visible(options["output"])[15] == (b"image 15", None)
    assert clean(options)


def test_unreadable_files_of_a_folder_are_tried_again(options, stage, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(b"image %d" % number)
    options |= {"input": str(folder), "unit_rows": 2}
    (folder / "3.png").chmod(0)
    blocked = {"image 3"}
    stage.refuses = lambda data, settings: "null_image" if data.decode() in blocked else None
    purify(options)
    blocked.clear()
    (folder / "3.png").chmod(0o644)
    stage.units.clear()
    assert again(options)["retry"]["quarantined now"] == {}
    assert stage.done == [("photos", 2)]
    assert "nothing to do" in purify(options)["this run"]


def test_the_verb_takes_the_settings_of_the_output(options, stage, visible, capsys):
    stage.refuses = slow(5)
    purify(options)
    stage.refuses = slow()
    flags = ["--output", options["output"], "--bundle", options["bundle"]]
    run_job("retry", [*flags, "--reason", "decoder_timeout"])
    assert "retry: done" in capsys.readouterr().out
    assert visible(options["output"])[5] == (b"image 5", None)


def test_raised_limits_name_the_reasons_they_lift():
    plain = {}
    assert raised_limits(plain, plain) == frozenset()
    assert raised_limits(plain, {"max_frames": 2000}) == {"too_large"}
    assert raised_limits({"max_frames": 10}, plain) == {"too_large"}
    both = {"extra_formats": ["GIF"], "max_megabytes": 100.0}
    assert raised_limits(plain, both) == {"too_large", "unsupported_format"}
    for lower in ({"extra_formats": ["TIFF"]}, {**both, "max_side": 5}):
        with pytest.raises(CorpusError, match="not lower them"):
            raised_limits(both, lower)
    assert set(DecodeLimits.model_fields) == {
        "max_megabytes",
        "max_megapixels",
        "max_side",
        "max_frames",
        "extra_formats",
    }
