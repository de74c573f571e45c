"""The page: everything is there, nothing is loaded, nothing hostile gets through."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from acsr_ray.corpus.retry_request import QUARANTINE_REASONS
from acsr_ray.corpus.snapshot import Snapshot
from acsr_ray.evaluation.markup import visible
from acsr_ray.reporting.contents import gather
from acsr_ray.reporting.job import to_json
from acsr_ray.reporting.page import run_page
from acsr_ray.reporting.record import RunRecord, read_record

VOID = {"meta", "img", "br"}
ALLOWED = {
    *(
        "html",
        "head",
        "body",
        "meta",
        "title",
        "style",
        "header",
        "main",
        "footer",
        "section",
        "h1",
        "h2",
        "h3",
    ),
    *("p", "b", "br", "span", "div", "code", "dl", "dt", "dd", "ul", "li", "details", "summary", "figure"),
    *(
        "figcaption",
        "img",
        "table",
        "caption",
        "tr",
        "th",
        "td",
        "svg",
        "rect",
        "line",
        "path",
        "circle",
        "text",
    ),
}


class Page(HTMLParser):
    """Tags with their attributes, and the text that is read."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.text, self.headings = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        if "style" not in self.open:
            self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(self.text)


@pytest.fixture(scope="module")
def contents(purified, record_of):
    storage, snapshot = purified.ledger.storage, purified.ledger.snapshot()
    return gather(storage, snapshot, read_record(record_of(purified), storage, snapshot))


@pytest.fixture(scope="module")
def page(contents):
    return Page(run_page(contents))


def test_all_parts_are_there(page):
    assert page.headings == [
        "Outcome of the images",
        "Time",
        "Planned and actual",
        "Before and after",
        "Change and distance",
        "Clusters",
        "Quarantine",
        "Not done",
    ]
    assert "✓ done" in page.words
    assert "unit_rows" in page.words
    titles = {text for text in page.text if text in CHARTS}
    assert titles == CHARTS
    assert len(page.named("svg")) == 8


CHARTS = {
    *("Throughput", "Images done", "Seconds per stage", "Images per second", "Time", "Residual"),
    *("Distance to the cluster", "Images per cluster"),
}


def test_figures_are_those_of_the_record(page, purified, record_of):
    record = record_of(purified)
    statuses = record["statuses"]
    assert f"{statuses['quarantined']} in quarantine, 10.0 %" in page.words
    assert "0.714 images per second" in page.words
    assert "it was 1 min 24 s: 1.12 times the plan, inside the range" in page.words
    assert f"{statuses['purified']} images: half below" in page.words
    assert "4 clusters, 54 images" in page.words


def test_pictures_are_the_originals_and_the_purified(contents, page):
    shown = [one for own in contents.examples.values() for one in own]
    assert len(shown) == 24
    images = page.named("img")
    for picture, (before, after, change) in zip(shown, zip(*[iter(images)] * 3, strict=False), strict=False):
        np.testing.assert_array_equal(pixels(before), picture.before)
        np.testing.assert_array_equal(pixels(after), picture.after)
        assert change["alt"].startswith("change of")
        # A whole number of times, so that no pixel is drawn larger than its neighbour.
        assert int(before["width"]) % 16 == int(before["height"]) % 16 == 0
    assert all(image["alt"] and image["class"] == "pixels" for image in images)
    assert len(images) > 3 * 24


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))


def test_difference_is_magnified_by_the_factor_that_is_told(contents, page):
    shown = [one for own in contents.examples.values() for one in own]
    factors = [
        int(text.split()[-1]) for text in page.text if text.startswith("difference \N{MULTIPLICATION SIGN}")
    ]
    changes = page.named("img")[2 : 3 * len(shown) : 3]
    for picture, factor, image in zip(shown, factors, changes, strict=True):
        change = picture.after.astype(int) - picture.before.astype(int)
        np.testing.assert_array_equal(pixels(image), np.clip(128 + factor * change, 0, 255))


def test_no_markup_comes_from_data(page, hostile):
    assert {tag for tag, _ in page.tags} <= ALLOWED
    for _, attributes in page.tags:
        assert not {"href", "srcset", "action", "data", "style", "xlink:href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    # As text it is there, with what would hide or turn it made visible.
    assert visible(hostile)[:40] in page.words
    assert r"\u202egnp.\x00&amp;" in page.words
    assert "\u202e" not in page.words
    assert "<script>alert(2)<|script>" in page.words
    assert "broken<b>.parquet" in page.words


def test_a_hostile_record_is_text_too(contents, hostile):
    text = {hostile: hostile}
    record = RunRecord(
        run=hostile,
        outcome=hostile,
        detail=hostile,
        input=hostile,
        output=hostile,
        bundle=hostile,
        started_at=hostile,
        settings={hostile: {hostile: hostile}},
        statuses={hostile: 3},
        reasons={hostile: 3},
        clusters={f"{hostile}/1": 3, f"{hostile}": 1},
        stage_seconds={hostile: 1.0},
        refused_shards=text,
        failed_units=text,
        unreadable=text,
        origin=hostile,
        plan={"estimate": {"seconds": hostile}, hostile: hostile},
    )
    names = replace(contents.names, class_names=(hostile,) * 3)
    source = run_page(replace(contents, record=record, names=names))
    page = Page(source)
    assert {tag for tag, _ in page.tags} <= ALLOWED
    assert page.words.count(visible(hostile)) > 10
    source.encode()


def test_nothing_of_a_refused_image_is_in_page_or_json(contents):
    page, told = run_page(contents), json.dumps(to_json(contents))
    for secret in (b"SECRET-OF-A-REFUSED-IMAGE",):
        for start in range(3):
            inner = base64.b64encode(secret[start:])[:-4].decode()
            assert inner not in page
            assert inner not in told
        assert secret.decode() not in page
        assert secret.decode() not in told
    assert "unsupported_format" in page


def test_an_output_without_a_record_is_told_from_a_sample(purified):
    storage, snapshot = purified.ledger.storage, purified.ledger.snapshot()
    contents = gather(storage, snapshot, read_record({"run": "x"}, storage, snapshot))
    page = Page(run_page(contents))
    assert "Counted over all 54 purified images of the output." in page.words
    assert "median residual of the sample" in page.words
    assert "60 images in the output" in page.words
    # The bundle is a folder that the output does not know, so only its classes are known by name.
    assert "The bundle is not at hand" in page.words
    assert re.search(r"ant 0|bee 0|cat 0", page.words)
    assert "Planned and actual" not in page.headings
    assert "Time" not in page.headings


def test_an_unused_cluster_is_seen(contents):
    usage = tuple(replace(use, images=0) if at == 1 else use for at, use in enumerate(contents.usage))
    page = Page(run_page(replace(contents, usage=usage)))
    assert len([shape for shape in page.named("rect") if shape["class"] == "unused"]) == 1
    assert "Never chosen: 1 (dashed)" in page.words
    assert "3 of 4 clusters in use" in page.words


def test_very_many_clusters_are_told_in_bounds(contents):
    usage = tuple(replace(contents.usage[0], label=f"c{at}", images=max(0, at - 99)) for at in range(3000))
    source = run_page(replace(contents, usage=usage))
    page = Page(source)
    assert "2,952 others" in page.words
    assert "and 60 more" in page.words
    assert len([shape for shape in page.named("rect") if shape["class"] == "bar"]) < 200


def test_a_picture_without_original_says_why(contents):
    one = replace(contents.examples["typical"][0], before=None, missing="the shard has changed since")
    page = Page(run_page(replace(contents, examples={"typical": (one,)}, montage={})))
    assert "No original: the shard has changed since." in page.words
    assert len(page.named("img")) == 1


def test_a_part_of_an_image_is_called_one(contents):
    one = replace(contents.examples["typical"][0], height=300, width=400)
    words = Page(run_page(replace(contents, examples={"typical": (one,)}))).words.replace(
        "\N{MULTIPLICATION SIGN}", "x"
    )
    assert "400 x 300 pixels, the middle 16 x 16 shown" in words


@pytest.mark.parametrize("outcome", ["stopped", "failed", "running"])
def test_a_run_that_is_not_done_says_so_first(contents, outcome):
    record = contents.record.model_copy(update={"outcome": outcome, "detail": "No room left"})
    words = Page(run_page(replace(contents, record=record))).words
    assert words.index("No room left.") < words.index("Outcome of the images")
    assert "✓ done" not in words


def test_an_output_of_nothing(purified):
    storage = purified.ledger.storage
    contents = gather(storage, Snapshot(), RunRecord(run="x"))
    page = Page(run_page(contents))
    assert "There is no purified image that could be shown." in page.words
    assert "No image of the output is in quarantine." in page.words
    assert not page.named("img")


def test_long_lists_are_told_in_bounds(contents):
    shards = {f"s{number}": "bad" for number in range(150)}
    record = contents.record.model_copy(update={"refused_shards": shards, "refused_shards_total": 4000})
    words = Page(run_page(replace(contents, record=record))).words
    assert "4,000 shards were refused" in words
    assert "The first 100 of 4,000; report.json has the first 150." in words
    assert "s99" in words
    assert "s100" not in words


def test_a_sample_of_a_long_run_is_not_called_all_of_it(purified):
    storage, snapshot = purified.ledger.storage, purified.ledger.snapshot()
    names = sorted(purified.ledger.published())[:2]
    fields = {"run": "x", "units": 500, "unit_names": names}
    contents = gather(storage, snapshot, read_record(fields, storage, snapshot))
    assert contents.sample == "a sample, 21 purified images in 2 of the 500 files of this run"
    fields["units"] = 2
    contents = gather(storage, snapshot, read_record(fields, storage, snapshot))
    assert contents.sample == "all 21 purified images of this run"
    shown = {one.row.place.receipt.name for own in contents.examples.values() for one in own}
    assert shown == set(names)


def test_every_reason_has_its_meaning(purified, record_of):
    reasons = dict.fromkeys((*QUARANTINE_REASONS, "solver_fallback"), 1)
    record = read_record(
        record_of(purified, reasons=reasons), purified.ledger.storage, purified.ledger.snapshot()
    )
    text = run_page(gather(purified.ledger.storage, purified.ledger.snapshot(), record, images=0))
    table = text[text.index("By reason") :].partition("</table>")[0]
    for reason in reasons:
        (row,) = re.findall(rf"<tr>(?:(?!<tr>).)*?>{reason}<.*?</tr>", table, re.DOTALL)
        meaning = re.sub("<[^>]+>", "", row.rsplit("<td", 1)[1].split(">", 1)[1])
        assert len(meaning) > 5, reason
