"""A guard against an input that is not what it was: how much may leave the output with it."""

from collections.abc import Mapping, Sequence

from acsr_ray.config import FailedError
from acsr_ray.corpus.snapshot import ShardEntry
from acsr_ray.corpus.sources import ImageFolder, Shard

SHOWN = 5


class RemovalError(FailedError):
    """So much of what was purified is no longer in the input that the input itself is in doubt."""


def check_removed(
    before: Mapping[str, ShardEntry],
    source: Sequence[Shard] | ImageFolder,
    most: float,
    emptied: Sequence[str] = (),
) -> None:
    """Refuse to go on where too much of what was purified is gone.

    Args:
        before: shards of the output, by relative path.
        source: the input as it was listed.
        most: share of the shards, or of a folder's images, that may be gone.
        emptied: shards that had rows and have none now.

    Raises:
        RemovalError: naming the first that are gone.
    """
    names: list[str] = []
    if isinstance(source, ImageFolder):
        had, what = sum(receipt.rows for entry in before.values() for receipt in entry.receipts), "images"
        gone = max(0, had - len(source.files))
    else:
        names = sorted({*(before.keys() - {shard.relative for shard in source}), *emptied})
        had, gone, what = len(before), len(names), "shards"
    if gone > most * had:
        first = f" (first: {', '.join(names[:SHOWN])})" if names else ""
        raise RemovalError(
            f"{gone} of {had} {what} that were purified are no longer in the input{first}, which is more "
            f"than the share --max-removed-share {most:g}: the output keeps them. Are they meant to go, run "
            "once with --max-removed-share 1"
        )
