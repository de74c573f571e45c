"""Do again the units of an output that failed, or hold rows quarantined for reasons that may be gone now."""

from typing import Any

from acsr_ray.config import ConfigError
from acsr_ray.corpus.retry_request import RetryRequest
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings
from acsr_ray.distributed.standing import completed


class RetrySettings(PurifyCorpusSettings):
    """Do again the units of OUTPUT that hold quarantined rows, or failed; the others stay as they are.

    Settings are those of the output unless given. Limits may be raised (--decode.*): then every unit with a
    row that they had refused is done again, and the output is bound to the new limits. Settings that decide
    no pixel (--decoder.*, --batch-size, --ray.*) may differ. Any other that differs is refused. What is new,
    changed or gone in the input is left to purify. A retry that was stopped goes on by the same command.
    """

    reason: tuple[str, ...] = ()
    """Only units with rows quarantined for these (decode_error decoder_timeout ...). None: failed units, and
    rows quarantined for what another try may change: decoder_crash, decoder_timeout, decoder_memory,
    out_of_memory, stage_error, worker_crash, and in a folder of images null_image."""


def retry(settings: RetrySettings) -> dict[str, Any]:
    """Retry units and return the summary, whose `retry` tells rows quarantined before and now.

    Raises:
        CorpusError: nothing was purified there, no such reason, or settings that a retry cannot change.
        FailedError: units that failed again; what was there of them stays.
        ResumableStop: a clean stop before the end.
    """
    if settings.output is None:
        raise CorpusError("--output is needed: the folder or URI of a purification")
    if settings.anew or settings.demo:
        raise ConfigError("a retry takes neither --anew nor --demo")
    request = RetryRequest(frozenset(settings.reason))
    return purify_corpus(completed(settings), request)
