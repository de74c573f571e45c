"""Markup: whatever comes as text stays text, whatever it holds."""

from html.parser import HTMLParser

import pytest

from acsr_ray.evaluation.markup import Markup, element, image, joined, page, visible

BAD = "\"><script>alert('1')</script><!--\u202e\x00\ud800"


class Reader(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_text_and_attributes_cannot_become_markup():
    made = Reader(element("p", BAD, element("b", BAD), title=BAD, class_="x"))
    assert [tag for tag, _ in made.tags] == ["p", "b"]
    assert made.tags[0][1] == {"title": visible(BAD), "class": "x"}
    assert made.text == visible(BAD) * 2


def test_markup_put_together_by_hand_is_text_again():
    assert joined(element("b", "x") + "<i>") == "&lt;b&gt;x&lt;/b&gt;&lt;i&gt;"
    assert joined(Markup("<i>"), "<i>") == "<i>&lt;i&gt;"


def test_what_cannot_be_seen_is_shown_as_its_code():
    assert visible("a\u202eb\x00c\ud800\u200bd\n") == r"a\u202eb\x00c\ud800\u200bd "
    assert visible("Käse \N{NO-BREAK SPACE}東京 ✓ مرحبا") == "Käse \N{NO-BREAK SPACE}東京 ✓ مرحبا"
    assert visible("0123456789", 5) == "01…89"
    assert visible("01234", 5) == "01234"
    visible(BAD).encode()


def test_attributes():
    assert element("rect", x=1.0, y=2.345, aria_label="a", viewBox="0 0 1 1", width=None) == (
        '<rect x="1" y="2.35" aria-label="a" viewBox="0 0 1 1"></rect>'
    )
    assert element("br") == "<br>"
    assert image(b"\xff", '"') == '<img alt="&quot;" src="data:image/png;base64,/w==">'


@pytest.mark.parametrize(
    "needed", ["default-src 'none'", "img-src data:", "prefers-color-scheme", "@media print"]
)
def test_the_page_lets_nothing_in_and_suits_every_reader(needed):
    source = page("<t>", element("p", "x"))
    assert needed in source.replace("&#x27;", "'")
    assert Reader(source).text.startswith("<t>")
