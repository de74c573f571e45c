"""The page: everything in it, in order, escaped, and nothing loaded from elsewhere."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from acsr_ray.corpus.images import encode_png
from acsr_ray.evaluation.report import Panel, Picture, Section, html_report
from acsr_ray.evaluation.sanity import SanityWarning
from acsr_ray.evaluation.tables import Table

BAD = """<script src="https://x/y.js">alert("1")</script> & 'x' <img src=http://z onerror=a>"""
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags with their attributes, and the text of each kind of element."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def _pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def section():
    return Section(
        "Heading",
        ("First.", "Second."),
        (SanityWarning("noise", "vgg/none: too much"),),
        (Table("T", "caption", ("a", "b"), (("1", "2"), ("3", "4"))),),
        (Picture("figure", encode_png(_pixels(5, 6))),),
        (Panel("panel", _pixels(7, 9, seed=1)),),
    )


def _decoded(image):
    head, data = image["src"].split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_page_holds_what_it_is_given(section):
    page = Page(html_report("Title", [section, Section(paragraphs=("Lead.",))]))
    assert page.texts["title"] == page.texts["h1"] == ["Title"]
    assert page.texts["h2"] == ["Heading"]
    assert page.texts["p"] == ["First.", "Second.", "Lead."]
    assert page.texts["th"] == ["a", "b"]
    assert page.texts["td"] == ["1", "2", "3", "4"]
    assert (page.texts["b"], page.texts["li"]) == (["noise", "T"], [": vgg/none: too much"])
    assert page.texts["figcaption"] == ["figure", "panel"]
    figure, panel = page.named("img")
    assert (figure["alt"], figure["class"]) == ("figure", "figure")
    assert (panel["alt"], panel["class"]) == ("panel", "panel")
    np.testing.assert_array_equal(_decoded(figure), _pixels(5, 6))
    np.testing.assert_array_equal(_decoded(panel), _pixels(7, 9, seed=1))


def test_the_order_is_text_warnings_tables_figures_panels(section):
    page = html_report("Title", [section])
    places = [page.index(text) for text in ("Heading", "First.", "noise", "<b>T</b>", ">figure<", ">panel<")]
    assert places == sorted(places)


def test_what_is_empty_leaves_nothing_behind():
    page = Page(html_report("T", [Section(), Section(tables=(Table("", "", ("a",), ()),))]))
    used = {name for name, _ in page.tags}
    assert not used & {"h2", "p", "ul", "img", "caption", "figcaption"}
    assert len(page.named("table")) == 1


def test_everything_is_escaped_and_nothing_comes_from_elsewhere(section):
    bad = Section(
        BAD,
        (BAD,),
        (SanityWarning(BAD, BAD),),
        (Table(BAD, BAD, (BAD,), ((BAD,),)),),
        (Picture(BAD, encode_png(_pixels(2, 2))),),
        (Panel(BAD, _pixels(2, 2)),),
    )
    page = Page(html_report(BAD, [bad, section]))
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action", "data", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
    assert len(page.named("img")) == 4
    assert page.named("img")[0]["alt"] == BAD
    style = "".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    for kind in ("h1", "h2", "p", "th", "td", "figcaption"):
        assert page.texts[kind][0] == BAD
