"""Entry point of `purify_corpus`: a corpus, or the demo that brings its own."""

from typing import Any

from acsr_ray.config import ConfigError
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings

__all__ = ["PurifyCorpusSettings", "purify_or_demo"]


def purify_or_demo(settings: PurifyCorpusSettings) -> dict[str, Any]:
    """Run the demo when asked for, else purify the corpus."""
    if not settings.demo:
        return purify_corpus(settings)
    if settings.input:
        raise CorpusError("--demo brings its own corpus and bundle; leave --input away")
    if settings.doubt or settings.target:
        raise CorpusError(
            "--demo brings its own bundle, which has no doubt model; leave --doubt and --target away"
        )
    if settings.reconstruction == "unrolled":
        raise ConfigError(
            "--demo trains its own bundle, and no network for it; leave --reconstruction unrolled away"
        )
    from acsr_ray.demo.run import run_demo

    return run_demo(settings)
