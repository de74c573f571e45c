"""What two snapshots of an output differ in, shard by shard."""

from dataclasses import dataclass

from acsr_ray.corpus.snapshot import ShardEntry, Snapshot


@dataclass(frozen=True)
class ShardChanges:
    """Relative paths of the shards that are new in an output, hold other units, or are no longer in it."""

    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def shard_changes(before: Snapshot, after: Snapshot) -> ShardChanges:
    """Return what changed; a shard that was only touched has not, one that lost all its rows has.

    Args:
        before: a snapshot.
        after: a later one of the same output.
    """
    units = {relative: _names(entry) for relative, entry in after.shards.items()}
    return ShardChanges(
        new=tuple(sorted(name for name, own in units.items() if own and name not in before.shards)),
        changed=tuple(
            sorted(
                name
                for name, own in units.items()
                if name in before.shards and own != _names(before.shards[name])
            )
        ),
        removed=tuple(sorted(before.shards.keys() - after.shards.keys())),
    )


def _names(entry: ShardEntry) -> frozenset[str]:
    return frozenset(receipt.name for receipt in entry.receipts)
