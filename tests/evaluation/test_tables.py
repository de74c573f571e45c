"""Tables in three formats: what is written is read back, whatever the cells hold."""

import csv
import io
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from acsr_ray.evaluation.tables import (
    LATEX_SPECIAL,
    Table,
    escape_latex,
    escape_markdown,
    to_csv,
    to_latex,
    to_markdown,
)

TABLE = Table(
    "Table 3", "500 images", ("defence", "FGSM %"), (("a|b & 50%_c", "91.2 [88.4, 93.4]"), ("none", "-"))
)

TEXT = st.text(
    st.one_of(st.sampled_from("|&%_\\`*<>$~#^{}[]()-+\"', \n\r\tab"), st.characters(codec="utf-8"))
)


@st.composite
def tables(draw):
    columns = draw(st.integers(1, 4))
    row = st.tuples(*[TEXT] * columns)
    return Table(draw(TEXT), draw(TEXT), draw(row), tuple(draw(st.lists(row, max_size=4))))


def one_line(text):
    return " ".join(text.split())


def cells_of(line):
    """Split a Markdown row at the bars that no backslash protects, and undo the protection."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [re.sub(r"\\(.)", r"\1", cell) for cell in re.findall(r" ((?:[^\\|]|\\.)*?) \|", line)]


@settings(deadline=None, max_examples=60)
@given(tables())
def test_markdown_rows_are_read_back(table):
    lines = to_markdown(table).split("\n")
    rows = [line for line in lines if line.startswith("|")]
    assert rows[1] == "| " + " | ".join([":--", *["--:"] * (len(table.header) - 1)]) + " |"
    expected = [[one_line(cell) for cell in row] for row in (table.header, *table.rows)]
    assert [cells_of(line) for line in (rows[0], *rows[2:])] == expected


@settings(deadline=None, max_examples=60)
@given(TEXT)
@example("<script>alert(1)</script>")
@example("[a](http://x)")
def test_markdown_has_no_special_character_of_its_own(text):
    bare = re.sub(r"\\.", "", escape_markdown(text))
    assert not set(bare) & set("\\`*_<>&|~$")
    assert "](" not in escape_markdown(text)


@settings(deadline=None, max_examples=60)
@given(tables())
def test_csv_is_read_back_exactly(table):
    rows = list(csv.reader(io.StringIO(to_csv(table), newline="")))
    assert rows == [list(row) for row in (table.header, *table.rows)]


@settings(deadline=None, max_examples=60)
@given(TEXT)
@example("50% of a_b & c # {x} $y$ \\ ~ ^")
def test_latex_text_is_read_back(text):
    escaped = escape_latex(text)
    commands = {command: character for character, command in LATEX_SPECIAL.items()}
    longest_first = sorted(commands, key=len, reverse=True)
    pattern = "|".join(re.escape(command) for command in longest_first)
    assert re.sub(pattern, lambda match: commands[match[0]], escaped) == one_line(text)
    # Outside the commands, nothing that LaTeX takes for one is left.
    assert not set(re.sub(pattern, "", escaped)) & set("\\&%$#_{}~^<>|[*")


@settings(deadline=None, max_examples=30)
@given(tables())
def test_latex_rows_have_a_cell_per_column_and_braces_match(table):
    text = to_latex(table)
    lines = text.split("\n")
    body = lines[lines.index(r"\hline") + 1 : len(lines) - 1 - lines[::-1].index(r"\hline")]
    rows = [line for line in body if line != r"\hline"]
    assert len(rows) == 1 + len(table.rows)
    for row in rows:
        assert row.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", row)) == len(table.header) - 1
    plain = re.sub(r"\\[{}]", "", text)
    depth = 0
    for character in plain:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0


def test_markdown_of_a_table():
    assert to_markdown(TABLE) == (
        "### Table 3\n\n500 images\n\n"
        "| defence | FGSM % |\n"
        "| :-- | --: |\n"
        "| a\\|b \\& 50%\\_c | 91.2 [88.4, 93.4] |\n"
        "| none | - |\n"
    )


def test_latex_of_a_table():
    assert to_latex(TABLE) == (
        "\\begin{table}\n\\centering\n\\caption{Table 3. 500 images}\n\\begin{tabular}{lr}\n\\hline\n"
        "defence & FGSM \\% \\\\\n\\hline\n"
        "a\\textbar{}b \\& 50\\%\\_c & 91.2 {[}88.4, 93.4] \\\\\n"
        "none & {-} \\\\\n"
        "\\hline\n\\end{tabular}\n\\end{table}\n"
    )


def test_a_table_without_caption():
    table = Table("T", "", ("a",), ())
    assert to_markdown(table) == "### T\n\n| a |\n| :-- |\n"
    assert r"\caption{T}" in to_latex(table)
    assert to_csv(table) == "a\r\n"


@pytest.mark.parametrize(
    ("header", "rows"), [((), ()), (("a", "b"), (("1",),)), (("a",), (("1",), ("1", "2")))]
)
def test_crooked_tables_are_refused(header, rows):
    with pytest.raises(ValueError, match="table 'T'"):
        Table("T", "", header, rows)
