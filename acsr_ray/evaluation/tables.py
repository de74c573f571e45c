"""Tables of text cells, written as Markdown, CSV and LaTeX with every special character escaped."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# GitHub's Markdown: a backslash before any of these makes them text, also in a table's cell.
MARKDOWN_SPECIAL = re.compile(r"[\\`*_<>&|~$]|(?<=\])\(")

LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # Braces stop `\\[` from being read as a distance, `\\*` as a command, and dashes from joining.
    "[": "{[}",
    "*": "{*}",
    "-": "{-}",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "∞": r"$\infty$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Table:
    """A table whose cells are text already."""

    title: str
    caption: str
    """What the numbers are: images, intervals, seed; "" for none."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        """Check that every row has a cell per column."""
        if not self.header:
            raise ValueError(f"table {self.title!r} has no column")
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"table {self.title!r} has {len(self.header)} columns, but a row of {len(row)}: {row}"
                )


def to_markdown(table: Table) -> str:
    """Return a GitHub-flavoured Markdown table under its title, first column left and others right."""
    align = [":--", *["--:"] * (len(table.header) - 1)]
    lines = [f"### {escape_markdown(table.title)}", ""]
    if table.caption:
        lines += [escape_markdown(table.caption), ""]
    lines += [_markdown_line(table.header, escape_markdown), _markdown_line(align, str)]
    return "\n".join([*lines, *(_markdown_line(row, escape_markdown) for row in table.rows)]) + "\n"


def to_csv(table: Table) -> str:
    """Return header and rows as CSV (RFC 4180); title and caption are left out, so that it parses."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([table.header, *table.rows])
    return buffer.getvalue()


def to_latex(table: Table) -> str:
    r"""Return a `table` environment that needs no package; the title is the start of its caption."""
    title = escape_latex(table.title)
    caption = f"{title}. {escape_latex(table.caption)}" if table.caption else title
    body = [_latex_line(row) for row in table.rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            r"\hline",
            _latex_line(table.header),
            r"\hline",
            *body,
            r"\hline",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escape_markdown(text: str) -> str:
    """Return text that GitHub's Markdown shows as it is, also inside a table's cell."""
    return MARKDOWN_SPECIAL.sub(lambda match: f"\\{match[0]}", _one_line(text))


def escape_latex(text: str) -> str:
    """Return text that LaTeX sets as it is."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in _one_line(text))


def _one_line(text: str) -> str:
    """Return the words of a text with single spaces; a line break would end the row."""
    return " ".join(text.split())


def _markdown_line(cells: Sequence[str], escape: Callable[[str], str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"


def _latex_line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(escape_latex, cells))} \\"
