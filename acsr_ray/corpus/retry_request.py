"""Asking for a retry: what it may change of an output, and what it may not.

A retry does the same work again, so it can only mend what did not follow from the input and the settings: a
worker that died, a decoder that ran out of time. Or it raises limits on decoding. Those are settings that
decide rows, but they decide only which images are refused: an image that was accepted before has the same
pixels under higher limits. So a retry may raise them, does again every unit with a row that they had refused,
and binds the output to the new limits; it is then the output that a run from nothing would have made.
Anything else that decides pixels would have to be done again for all images: another output, or `--anew`.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from acsr_ray.artifacts import json_digest
from acsr_ray.corpus.agenda import NightSettings
from acsr_ray.corpus.binding import differences
from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.ledger import Ledger, shard_of
from acsr_ray.corpus.records import failed_units
from acsr_ray.corpus.refusals import REASONS
from acsr_ray.corpus.retrying import RetryOrder, next_order
from acsr_ray.corpus.snapshot import Snapshot
from acsr_ray.corpus.sources import CorpusError

logger = logging.getLogger(__name__)

BY_CHANCE = (
    "decoder_crash",
    "decoder_timeout",
    "decoder_memory",
    "out_of_memory",
    "stage_error",
    "worker_crash",
)
"""Reasons that say more about a machine, its load and the limits on processes than about an image."""
QUARANTINE_REASONS = tuple(dict.fromkeys((*REASONS, *BY_CHANCE)))
CANNOT = (
    "a retry does the same work again for some units; it may raise limits (--decode.*) and change what "
    "decides no pixel (--decoder.*, --batch-size, --ray.* and so on). Other settings would change all "
    "images: use another --output, or purify --anew. What differs:"
)


class OrdinaryRun:
    """A run that does what is new, what changed, and what is missing: what a retry is not.

    Args:
        bundle: manifest of the bundle.
        anew: whether an output of other settings is replaced.
    """

    def __init__(self, bundle: Mapping[str, Any] | None, *, anew: bool) -> None:
        self._bundle, self._anew = bundle, anew

    def check(self, ledger: Ledger, bound: Mapping[str, Any]) -> None:
        """Refuse an output of other settings; see `Binding.check`."""
        ledger.check(bound, self._bundle, anew=self._anew)

    def begin(
        self, ledger: Ledger, asked: NightSettings, bound: Mapping[str, Any], deciding: Mapping[str, Any]
    ) -> NightSettings:
        """Bind the output and return the run's settings, its units named as those of the output are."""
        ledger.claim(bound, self._bundle)
        order = ledger.binding.retry_order()
        if order is not None and order.is_open:
            logger.warning(
                "retry %d of %s, of %s, has not come to its end: `acsr-ray retry` goes on with it",
                order.number,
                ledger.output,
                order.since,
            )
        return replace(asked, fingerprint=ledger.binding.naming(json_digest(deciding)))

    def finish(self, ledger: Ledger) -> None:
        """Do nothing: what is left undone the next run finds."""


class RetryRequest:
    """A wish to do units of an output again.

    Args:
        reasons: of quarantined rows; empty: all that another try could change, and failed units.

    Raises:
        CorpusError: a reason that no row can be quarantined for.
    """

    def __init__(self, reasons: frozenset[str]) -> None:
        unknown = sorted(reasons - set(QUARANTINE_REASONS))
        if unknown:
            hint = (
                " (the row is purified, by its low band alone, and would be again)"
                if "solver_fallback" in unknown
                else ""
            )
            known = ", ".join(QUARANTINE_REASONS)
            raise CorpusError(f"no row is quarantined for {', '.join(unknown)}{hint}; reasons: {known}")
        self._reasons = reasons
        self._raised = frozenset[str]()
        """Reasons whose rows may be accepted because limits were raised."""
        self._bound: Mapping[str, Any] = {}
        self._order: RetryOrder | None = None
        self._fingerprint = ""

    def check(self, ledger: Ledger, bound: Mapping[str, Any]) -> None:
        """Refuse what a retry cannot do; writes nothing.

        Args:
            ledger: of the output.
            bound: the settings asked for now.

        Raises:
            CorpusError: nothing was purified there, or settings differ that a retry cannot change.
        """
        before = ledger.binding.settings()
        if before is None:
            raise CorpusError(f"nothing was purified at {ledger.output} yet: there is nothing to retry")
        old = {key: value for key, value in before.items() if key != "decode"}
        changed = differences(old, {key: value for key, value in bound.items() if key != "decode"})
        lines = [f"\n  {key}: {was!r} -> {now!r}" for key, (was, now) in changed.items()]
        if lines:
            raise CorpusError(CANNOT + "".join(lines))
        self._raised = raised_limits(before.get("decode", {}), bound["decode"])
        unlisted = ledger.finished() - ledger.snapshot().names() if self._raised else set()
        if unlisted:
            raise CorpusError(
                f"a run of {ledger.output} did not end and left {len(unlisted)} units, which were made under "
                "the limits of before; end it first, by the same command, and then retry with other limits"
            )

    def begin(
        self, ledger: Ledger, asked: NightSettings, bound: Mapping[str, Any], deciding: Mapping[str, Any]
    ) -> NightSettings:
        """Write the order down and return the settings of the run that carries it out.

        Args:
            ledger: of the output, whose lease is held.
            asked: settings of the run.
            bound: what the output will be bound to.
            deciding: those of them that decide rows.
        """
        self.check(ledger, bound)
        snapshot, before, raised = ledger.snapshot(), ledger.binding.settings() or {}, self._raised
        reasons, shards = self._reasons or _by_chance(snapshot), frozenset[str]()
        if not self._reasons or raised:
            shards = frozenset(r for r, entry in snapshot.shards.items() if not entry.complete)
        if not self._reasons:
            # Some have been done since by an ordinary run.
            shards |= {shard_of(name) for name in failed_units(ledger.storage).keys() - snapshot.names()}
        if not raised and self._reasons and self._reasons.isdisjoint(BY_CHANCE):
            logger.warning(
                "no limit was raised: rows quarantined for %s are only accepted by another decoder, as a new "
                "release may have",
                ", ".join(sorted(self._reasons)),
            )
        self._order = next_order(ledger.binding.retry_order(), snapshot, reasons | raised, shards)
        self._bound = bound
        self._fingerprint = ledger.binding.naming(
            json_digest({**deciding, "decode": before.get("decode", {})})
        )
        ledger.binding.order_retry(self._order, bound, self._fingerprint)
        logger.info("retry %d: %s", self._order.number, ", ".join(sorted(self._order.reasons)))
        return replace(asked, fingerprint=self._fingerprint, retry=self._order)

    def finish(self, ledger: Ledger) -> None:
        """Close the order: all of it was tried, and what failed again is told."""
        if self._order is not None:
            ledger.binding.order_retry(replace(self._order, is_open=False), self._bound, self._fingerprint)


def raised_limits(before: Mapping[str, Any], now: Mapping[str, Any]) -> frozenset[str]:
    """Return the reasons whose rows may be accepted under new limits; empty for the same limits.

    Args:
        before: fields of `DecodeLimits` that are not its defaults.
        now: the same, of now.

    Raises:
        CorpusError: a limit is lower than before: images that were purified would have to be refused.
    """
    old, new = DecodeLimits.model_validate(before), DecodeLimits.model_validate(now)
    reasons = set()
    for name in DecodeLimits.model_fields:
        was, is_now = getattr(old, name), getattr(new, name)
        if name == "extra_formats":
            lower, reason = not set(was) <= set(is_now), "unsupported_format"
        else:
            lower, reason = is_now < was, "too_large"
        if lower:
            raise CorpusError(
                f"a retry may raise limits, not lower them: decode.{name} is {was!r} in the output, asked "
                f"for is {is_now!r}; images that were purified would have to be refused. Use purify --anew"
            )
        if was != is_now:
            reasons.add(reason)
    return frozenset(reasons)


def _by_chance(snapshot: Snapshot) -> frozenset[str]:
    # In a folder of images, a file that could not be read is a null image; in a shard, one is what it says.
    folder = any(not entry.content for entry in snapshot.shards.values())
    return frozenset((*BY_CHANCE, "null_image") if folder else BY_CHANCE)
