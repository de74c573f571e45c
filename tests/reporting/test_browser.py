"""The page in a real browser: it shows what it holds, runs nothing, and asks for nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from acsr_ray.reporting.job import write_report

BROKEN = "[...document.images].filter(one => !one.complete || one.naturalWidth === 0).length"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page(purified, record_of, keep):
    run = keep(purified, record_of(purified, run="20260201T000000Z"))
    write_report(purified.ledger, run, images=8)
    return purified.output / "_acsr" / "runs" / run / "report.html"


def test_the_page_is_shown_whole_and_offline(browser, page):
    browser.resize(1000)
    browser.open(page)
    light = seen(browser.look(whole=True))
    browser.resize(1000, dark=True)
    dark = seen(browser.look())
    assert browser.evaluate("document.images.length") > 24
    assert browser.evaluate(BROKEN) == 0
    assert browser.evaluate("document.querySelectorAll('svg rect.bar').length") > 20

    # Hostile names are text: nothing ran, nothing was asked for, nothing was refused by the page's policy.
    assert browser.evaluate("document.scripts.length") == 0
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.messages == []

    # Not blank, in either light, and of as many colours as pictures have.
    assert np.median(light) > 240
    assert np.median(dark) < 60
    assert len(np.unique(light[::2, ::2].reshape(-1, 3), axis=0)) > 1000
    assert light.shape[0] > 2000
    browser.resize(400)
    assert browser.evaluate(OVERFLOW) <= 0


def test_the_watch_sees_what_it_should_not_see(browser, tmp_path):
    """A page that runs and loads something is noticed, so the silence of the other means something."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<img src=x.png><script>console.log('ran')</script><svg><image href='http://127.0.0.1:9/y'/></svg>"
    )
    browser.requests.clear()
    browser.open(path)
    assert browser.evaluate(BROKEN) == 1
    assert any("ran" in message for message in browser.messages)
    assert any(url.endswith("x.png") for url in browser.requests)
    assert any(url == "http://127.0.0.1:9/y" for url in browser.requests)


def seen(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
