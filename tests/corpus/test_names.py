"""Names of outputs: safe ones stay, others are replaced, and two shards never share one."""

import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from acsr_ray.corpus.names import MAX_PART_BYTES, MAX_PATH_BYTES, safe_name

CHARACTERS = st.one_of(
    st.sampled_from("ab./\\~_ -:*?\n\0é\u0301\u202e\ud800A\u212b"), st.characters(exclude_categories=[])
)
PATHS = st.one_of(st.text(CHARACTERS, max_size=30), st.text("ab/", min_size=200, max_size=1500))


@pytest.mark.parametrize(
    "name",
    ["a", "train-00000-of-00005", "b/1", "some.name", "a b/x[1]", "day=2026-01-01/ä", "~x", "a~" + "0" * 19],
)
def test_safe_names_stay(name):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "a/../b",
        "./a",
        "a//b",
        "/a",
        "a/",
        "a\\b",
        "..\\..\\a",
        "a\nb",
        "a\0",
        "\ud800",
        "e\u0301",
        "a:b",
        "a.",
        "a ",
        ".a",
        "_a",
        "\u202eb",
        "a" * 181,
        "ä" * 91,
        "a/" * 301,
        "a~" + "0" * 20,
        "C:\\x",
        "a|b",
        "*",
    ],
)
def test_other_names_are_replaced(name):
    replaced = safe_name(name)
    assert replaced != name
    assert safe_name(name) == replaced


def test_replaced_names_can_still_be_recognised():
    assert safe_name("holidays: 2026/img").startswith("holidays- 2026~")
    assert safe_name("x" * 300).startswith("x" * 60 + "~")


@settings(max_examples=400)
@given(name=PATHS)
@example("../../etc/passwd")
@example("\u212b")
def test_every_name_is_safe(name):
    replaced = safe_name(name)
    parts = replaced.split("/")
    assert len(replaced.encode()) <= MAX_PATH_BYTES
    for part in parts:
        assert 0 < len(part.encode()) <= MAX_PART_BYTES
        assert part.isprintable()
        assert part[0] not in "._"
        assert part[-1] not in ". "
        assert not set(part) & set('\\:*?"<>|')
        assert unicodedata.normalize("NFC", part) == part
    assert Path("/root-of-output", *parts).resolve().is_relative_to("/root-of-output")


@settings(max_examples=400)
@given(one=PATHS, other=PATHS)
@example("a//b", "a/b")
@example("\u00e9", "e\u0301")
@example("a\\b", "a-b")
def test_two_names_never_become_one(one, other):
    names = [one, other, safe_name(one), safe_name(other)]
    # A name may look like the replacement of another: it is then replaced itself.
    distinct = set(names)
    assert len({safe_name(name) for name in distinct}) == len(distinct)


@settings(deadline=None, max_examples=60)
@given(name=PATHS)
def test_a_file_system_takes_every_name(name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f".{safe_name(name)}.rows-0000000-0000000.01234567.parquet.4194304.tmp"[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        assert [found.relative_to(folder) for found in Path(folder).rglob("*.tmp")] == [
            path.relative_to(folder)
        ]
