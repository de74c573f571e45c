"""HTML and SVG that are safe by construction: whatever is not markup already is escaped.

Names of shards, keys of rows and messages come from data, so they may be hostile. They are plain strings, and
`element` is the only way from a string to markup.
"""

import base64
import html
import unicodedata

from acsr_ray.evaluation.style import STYLE

VOID = frozenset({"meta", "img", "br"})
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories of what a page does not show, or what turns the text beside it around."""

CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the page tells the browser: nothing runs and nothing is loaded, even if something slipped through."""


class Markup(str):
    """HTML as it stands; never made of data."""

    __slots__ = ()


def visible(text: str, most: int = 0) -> str:
    r"""Return a text with every character that would not be seen as its code, such as `\u202e`.

    Args:
        text: of any origin, lone surrogates included.
        most: characters from which on the middle is left out; 0 keeps all.
    """
    if most and len(text) > most:
        half = (most - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    # Pictures are long texts of nothing but visible characters.
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in "\n\t\r":
        return " "
    if unicodedata.category(character) in INVISIBLE:
        return character.encode("unicode_escape").decode()
    return character


def element(tag: str, *content: str, **attributes: str | float | None) -> Markup:
    """Return an element.

    Args:
        tag: name, never from data.
        content: markup is taken as it is, any other text is escaped.
        attributes: by name, `_` for `-` and a `_` at the end dropped (`class_`); None leaves one out.
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(visible(_value(value)))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Markup(f"<{tag}{named}>")
    return Markup(f"<{tag}{named}>{joined(*content)}</{tag}>")


def joined(*content: str) -> Markup:
    """Return several pieces one after the other; markup as it is, any other text escaped."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(visible(part)) for part in content)
    )


def _value(value: str | float) -> str:
    # Two decimals are finer than a pixel of any drawing here.
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def image(png: bytes, alt: str, **attributes: str | float | None) -> Markup:
    """Return a PNG as an element that holds its bytes."""
    data = base64.b64encode(png).decode()
    return element("img", **attributes, alt=alt, src=f"data:image/png;base64,{data}")


def page(title: str, *body: str) -> str:
    """Return a whole page in the common style, light or dark as the reader has it."""
    head = joined(
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=CONTENT_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return f'<!doctype html><html lang="en">{head}{joined(*body)}</html>\n'
