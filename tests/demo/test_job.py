"""The demo refuses, before it trains anything, options that would do nothing or could not be had."""

import pytest

from acsr_ray.config import AcsrError
from acsr_ray.demo.job import purify_or_demo
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "x"}, "leave --input away"),
        ({"doubt": "x"}, "has no doubt model; leave --doubt and --target away"),
        ({"target": "x"}, "has no doubt model; leave --doubt and --target away"),
        ({"reconstruction": "unrolled"}, "no network for it; leave --reconstruction unrolled away"),
    ],
)
def test_what_the_demo_does_not_have_is_refused_at_once(options, message, tmp_path):
    with pytest.raises(AcsrError, match=message):
        purify_or_demo(PurifyCorpusSettings(demo=True, output=str(tmp_path / "out"), **options))
    assert not list(tmp_path.iterdir())
