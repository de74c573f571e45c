"""What an output is bound to: the settings that decide its content, and the last order for a retry.

All of it is one file, `_acsr/run.json`, so that settings and the order that follows from them change at once.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from acsr_ray.artifacts import json_digest
from acsr_ray.corpus.retrying import RetryOrder
from acsr_ray.corpus.sources import CorpusError
from acsr_ray.storage import Storage

RUN, BUNDLE, DATA = "_acsr/run.json", "_acsr/bundle.json", "data"
NAMED_BY, RETRY = "named_by", "retry"
"""Keys of `run.json` beside the settings: the fingerprint that names units where it is not that of the
settings, and the order."""
CUT_BY = ("input", "limit", "unit_rows", "unit_megabytes")
"""Settings that an output is bound to, but that decide no row: which rows there are, and how they are cut."""
SHOWN_CHANGES = 12
BUNDLE_NAME = "bundle.name"


class Binding:
    """The settings of one output.

    Args:
        storage: of the output.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def check(
        self,
        settings: Mapping[str, Any],
        bundle: Mapping[str, Any] | None = None,
        *,
        anew: bool = False,
    ) -> None:
        """Refuse an output that was begun with other settings, or is not ours; writes nothing.

        Args:
            settings: what decides the output.
            bundle: manifest of the bundle, to tell what differs in it.
            anew: whether other settings will do; what is not ours never will.

        Raises:
            CorpusError: naming what differs.
        """
        before = self.settings()
        if before is not None:
            changed = differences(before, settings)
            if anew or not changed:
                return
            if "bundle_digest" in changed and bundle is not None:
                inside = differences(read_json(self._storage, BUNDLE) or {}, bundle)
                # Of bundles with other names every number differs, which tells nothing.
                inside = {BUNDLE_NAME: inside[BUNDLE_NAME]} if BUNDLE_NAME in inside else inside
                changed |= {f"bundle: {key}": pair for key, pair in inside.items()}
            lines = [f"\n  {key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]
            if len(lines) > SHOWN_CHANGES:
                lines[SHOWN_CHANGES:] = [f"\n  and {len(lines) - SHOWN_CHANGES} more"]
            raise CorpusError(
                f"output {self._storage.root} was made with other settings; use another --output, or --anew "
                "to purify all of it again and then replace what is there:" + "".join(lines)
            )
        if self._storage.names(DATA):
            raise CorpusError(f"{self._storage.root}/{DATA} holds files that no purification here wrote")

    def claim(self, settings: Mapping[str, Any], bundle: Mapping[str, Any] | None = None) -> None:
        """Bind the output to the settings that decide its content; whoever calls has checked them."""
        before = self.settings()
        if before is None or differences(before, settings):
            if bundle is not None:
                write_json(self._storage, BUNDLE, bundle)
            chained = self._chained(settings)
            write_json(self._storage, RUN, {**settings, **({} if chained is None else {NAMED_BY: chained})})

    def settings(self) -> dict[str, Any] | None:
        """Return the settings that the output is bound to, None where there are none yet."""
        run = self._run()
        return {key: value for key, value in run.items() if key not in (NAMED_BY, RETRY)} or None

    def naming(self, fingerprint: str) -> str:
        """Return the fingerprint that names the output's units.

        Args:
            fingerprint: of the settings that the output is bound to.
        """
        return str(self._run().get(NAMED_BY, fingerprint))

    def naming_after(self, settings: Mapping[str, Any], fingerprint: str) -> str:
        """Return what `naming` will once the output is bound to these settings; writes nothing.

        Args:
            settings: that `claim` would be given.
            fingerprint: of them.
        """
        before = self.settings()
        if before is not None and not differences(before, settings):
            return self.naming(fingerprint)
        return self._chained(settings) or fingerprint

    def _chained(self, settings: Mapping[str, Any]) -> str | None:
        # A name may never come to mean other rows than those it stood for.
        named_by = self._run().get(NAMED_BY)
        return None if named_by is None else json_digest([named_by, dict(settings)])

    def retry_order(self) -> RetryOrder | None:
        """Return the last order for a retry, None where there was none."""
        order = self._run().get(RETRY)
        return None if order is None else RetryOrder.from_dict(order)

    def order_retry(self, order: RetryOrder, settings: Mapping[str, Any], fingerprint: str) -> None:
        """Write down an order for a retry, and the settings that hold from now on, at once.

        Args:
            order: what is to be done, or was.
            settings: what the output is bound to; they may accept more images than those before.
            fingerprint: that names the output's units, which stays.
        """
        write_json(self._storage, RUN, {**settings, NAMED_BY: fingerprint, RETRY: order.to_dict()})

    def _run(self) -> dict[str, Any]:
        return read_json(self._storage, RUN) or {}


def read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    """Return a JSON object of a storage, None where there is none.

    Raises:
        CorpusError: what is there is no JSON object; the message says what to do.
    """
    try:
        content = json.loads(storage.read(name))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(storage, name, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(storage, name, "no JSON object")
    return content


def _damaged(storage: Storage, name: str, why: str) -> CorpusError:
    # Which files are this output's, and how they were made, is told by `run.json` alone.
    way_out = (
        "put a copy of it back, or use another --output" if name == RUN else "remove it: it is not needed"
    )
    return CorpusError(f"{storage.root}/{name} is damaged ({why}); {way_out}")


def write_json(storage: Storage, name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON object to a storage, or replace it."""
    storage.write(name, (json.dumps(content, indent=1) + "\n").encode())


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (before, after) of every value that differs, by its path."""
    old, new = dict(_flat(before)), dict(_flat(after))
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
