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
    run = keep(purified, record_of(purified))
    write_report(purified.ledger, run)
    return purified.output / "_acsr" / "runs" / run / "report.html"


def test_the_page_is_shown_whole_and_offline(browser, page):
    browser.requests.clear()
    browser.messages.clear()
    browser.open(page)
    light = _seen(browser.look(1200))
    dark = _seen(browser.look(1200, dark=True))
    assert browser.evaluate(BROKEN) == 0
    assert browser.evaluate("document.images.length") > 72
    assert browser.evaluate("document.querySelectorAll('svg rect.bar').length") > 20
    assert browser.evaluate("document.querySelector('script')") is None

    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [page.as_uri()]
    assert browser.messages == []

    # Not blank, in either light, and of as many colours as pictures have.
    for seen, ground in ((light, 255), (dark, 23)):
        assert abs(int(np.median(seen)) - ground) < 25
        assert len(np.unique(seen[::3, ::3].reshape(-1, 3), axis=0)) > 2000
    assert np.median(dark) < 60

    browser.look(400)
    assert browser.evaluate(OVERFLOW) <= 0


def _seen(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
