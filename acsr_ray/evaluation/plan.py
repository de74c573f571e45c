"""From a grid to units of work: which chunks to attack and to defend, each with its fingerprint.

A unit's fingerprint is a digest of everything that decides its rows: the chunk's pixels, the weights of the
target, the attack with its calibrated budget, the defence with its artifact, the seed. A changed setting
makes other units and leaves the rest in the cache.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from acsr_ray.attacks.spec import AttackConfig
from acsr_ray.corpus.labelled import read_labelled
from acsr_ray.evaluation.cells import Chunk, fingerprint
from acsr_ray.evaluation.grid import CLEAN, EvaluationData, Grid, SweepAttack, SweepDefense, SweepTarget

NamedT = TypeVar("NamedT", SweepTarget, SweepDefense)
KNOWLEDGE_VERSIONS = {"low_frequency": "low_frequency 2"}
"""Names what an attacker's knowledge is called in fingerprints since the code behind it gave other images."""


@dataclass(frozen=True)
class EvaluationSet:
    """A loaded split: chunks in order, the digest of each, and the class names."""

    data: EvaluationData
    split: str
    chunks: tuple[Chunk, ...]
    digests: tuple[str, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(len(chunk) for chunk in self.chunks)

    def whole(self) -> Chunk:
        """Return all chunks as one."""
        return Chunk(
            np.concatenate([chunk.pixels for chunk in self.chunks]),
            np.concatenate([chunk.labels for chunk in self.chunks]),
            np.concatenate([chunk.keys for chunk in self.chunks]),
        )


@dataclass(frozen=True)
class AttackUnit:
    """Attack one chunk of one set; `defense` only for adaptive attacks."""

    fingerprint: str
    set_index: int
    chunk_index: int
    attack: SweepAttack
    crafted_on: SweepTarget
    defense: SweepDefense | None
    seed: int


@dataclass(frozen=True)
class DefendUnit:
    """Defend and classify one chunk of one set: clean, or as `attacked_by` left it."""

    fingerprint: str
    set_index: int
    chunk_index: int
    target: SweepTarget
    attack: SweepAttack | None
    defense: SweepDefense
    seed: int
    attacked_by: str | None

    @property
    def attack_name(self) -> str:
        """Name of the attack, or `clean`."""
        return self.attack.name if self.attack else CLEAN


@dataclass(frozen=True)
class Plan:
    """All units of a grid."""

    attacks: tuple[AttackUnit, ...]
    defends: tuple[DefendUnit, ...]


def load_set(data: EvaluationData, split: str, seed: int, chunk: int) -> EvaluationSet:
    """Read a split, draw its images with the seed and cut it into chunks.

    Args:
        data: where it is.
        split: `test` or `validation`.
        seed: of the draw; images keep the order of the shards.
        chunk: images per unit.
    """
    locations, count = (
        (data.test, data.images) if split == "test" else (data.validation, data.validation_images)
    )
    images = read_labelled(locations, data.image_size)
    chosen = np.arange(len(images))
    if count is not None and count < len(images):
        chosen = np.sort(np.random.default_rng(seed).choice(len(images), count, replace=False))
    chunks = tuple(
        Chunk(images.pixels[rows], images.labels[rows], np.arange(start, start + len(rows)))
        for start in range(0, len(chosen), chunk)
        for rows in (chosen[start : start + chunk],)
    )
    digests = tuple(_chunk_digest(part) for part in chunks)
    return EvaluationSet(data, split, chunks, digests, images.class_names)


def _chunk_digest(chunk: Chunk) -> str:
    digest = hashlib.sha256(chunk.pixels.tobytes())
    digest.update(chunk.labels.tobytes() + chunk.keys.tobytes() + str(chunk.pixels.shape).encode())
    return digest.hexdigest()


def plan_units(
    grid: Grid,
    sets: Sequence[EvaluationSet],
    target_digests: Mapping[str, str],
    defense_digests: Mapping[str, str],
    budgets: Mapping[tuple[str, str, str], AttackConfig],
) -> Plan:
    """Return every unit of a grid.

    Args:
        grid: the sweep.
        sets: loaded splits; validation splits get clean cells only.
        target_digests: digest of each target, by name.
        defense_digests: digest of each defence, by name.
        budgets: calibrated attacks by (data, target, attack) names, where an attack is calibrated.
    """
    attacks: dict[str, AttackUnit] = {}
    defends: list[DefendUnit] = []
    for set_index, loaded in enumerate(sets):
        if loaded.split != "test" and not grid.choose:
            # Calibration reads the split itself; nobody would read these cells.
            continue
        defenses = grid.defenses_of(loaded.data.name)
        for chunk_index, digest in enumerate(loaded.digests):
            for target in grid.targets_of(loaded.data.name):
                base = (digest, target_digests[target.name])
                for defense in defenses:
                    name = fingerprint(["clean", *base, defense_digests[defense.name]])
                    defends.append(
                        DefendUnit(name, set_index, chunk_index, target, None, defense, grid.seeds[0], None)
                    )
                for attack in grid.attacks if loaded.split == "test" else ():
                    used = attack
                    if attack.calibrate_to is not None:
                        budget = budgets[loaded.data.name, target.name, attack.name]
                        used = attack.model_copy(update={"attack": budget})
                    source = _named(grid.targets, attack.source) if attack.source else target
                    crafted = (digest, target_digests[source.name])
                    count = _limited(attack, loaded.chunks[chunk_index])
                    for seed, defense in _met(used, count, grid.seeds, defenses):
                        seen = defense if attack.adaptive else None
                        if attack.through is not None:
                            seen = _named(grid.defenses, attack.through)
                        key = _attack_key(
                            used, crafted, count, defense_digests[seen.name] if seen else None, seed
                        )
                        attacks.setdefault(
                            key, AttackUnit(key, set_index, chunk_index, used, source, seen, seed)
                        )
                        name = fingerprint(["defend", key, *base, defense_digests[defense.name]])
                        defends.append(
                            DefendUnit(name, set_index, chunk_index, target, used, defense, seed, key)
                        )
    return Plan(tuple(attacks.values()), tuple(defends))


def _met(
    attack: SweepAttack, count: int | None, seeds: Sequence[int], defenses: Sequence[SweepDefense]
) -> Iterator[tuple[int, SweepDefense]]:
    """Yield the seeds and defences that an attack meets on a chunk of which it takes `count` images."""
    if count == 0:
        return
    for defense in defenses:
        if attack.defenses is not None and defense.name not in attack.defenses:
            continue
        # An attacker who sees a random defence tries other draws of it under every seed.
        drawn = attack.random or (attack.adaptive and defense.config.randomized)
        for seed in seeds if drawn else seeds[:1]:
            yield seed, defense


def _attack_key(
    attack: SweepAttack, crafted: tuple[str, str], count: int | None, seen: str | None, seed: int
) -> str:
    """Return the fingerprint of an attack on a (chunk, target); `seen` is the digest of a defence it sees."""
    return fingerprint(
        [
            "attack",
            *crafted,
            attack.attack.identity(),
            KNOWLEDGE_VERSIONS.get(attack.knowledge, attack.knowledge) if seen is not None else "bare",
            attack.eot_samples if seen is not None else 1,
            count,
            seen,
            seed,
        ]
    )


def unit_chunk(sets: Sequence[EvaluationSet], unit: AttackUnit | DefendUnit) -> Chunk:
    """Return the images of a unit; an attack on the first images only cuts the last chunk."""
    chunk = sets[unit.set_index].chunks[unit.chunk_index]
    count = _limited(unit.attack, chunk) if unit.attack else None
    return chunk if count is None else chunk.head(count)


def _limited(attack: SweepAttack, chunk: Chunk) -> int | None:
    """Return how many of a chunk's images an attack takes; None for all, whatever its limit."""
    left = len(chunk) if attack.images is None else attack.images - int(chunk.keys[0])
    return None if left >= len(chunk) else max(0, left)


def _named(entries: Sequence[NamedT], name: str) -> NamedT:
    return next(entry for entry in entries if entry.name == name)
