"""Splits: proportions, determinism, independence of the classes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acsr_ray.corpus.samples import Sample, check_splits, class_counts, hold_out, shuffled, stratified_split
from acsr_ray.corpus.sources import CorpusError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=300)
SHARES = st.lists(st.floats(0.05, 10), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(labels=LABELS, shares=SHARES, seed=st.integers(0, 2**31))
def test_parts_are_a_partition_with_the_shares_of_every_class(labels, shares, seed):
    parts = stratified_split(labels, shares, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    array = np.asarray(labels)
    for part, share in zip(parts, shares, strict=True):
        assert (np.diff(part) > 0).all()
        for label in set(labels):
            wanted = (array == label).sum() * share / sum(shares)
            assert abs((array[part] == label).sum() - wanted) <= 1
    again = stratified_split(labels, shares, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_the_paper_s_shares_are_exact_for_multiples_of_twenty():
    labels = [0] * 40 + [1] * 200
    parts = stratified_split(labels, (14, 3, 3), seed=3)
    assert [np.bincount(np.asarray(labels)[part]).tolist() for part in parts] == [
        [28, 140],
        [6, 30],
        [6, 30],
    ]


def test_another_seed_is_another_split():
    labels = [0] * 100
    assert not np.array_equal(stratified_split(labels, (1, 1), 0)[0], stratified_split(labels, (1, 1), 1)[0])


def test_images_added_to_one_class_move_none_of_another():
    first = stratified_split([0] * 50 + [1] * 10, (7, 3), 0)
    second = stratified_split([0] * 50 + [1] * 33, (7, 3), 0)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a[a < 50], b[b < 50])


@pytest.mark.parametrize("shares", [(), (0, 0), (1, -1)])
def test_impossible_shares(shares):
    with pytest.raises(ValueError, match="shares must be"):
        stratified_split([0, 1], shares, 0)


def _samples(labels):
    return [Sample(str(number), label, Path("x")) for number, label in enumerate(labels)]


def test_validation_images_are_taken_from_every_class():
    samples = _samples([number % 2 for number in range(40)])
    train, validation = hold_out(samples, 0.1, 0)
    assert class_counts(train, 2) == [18, 18]
    assert class_counts(validation, 2) == [2, 2]
    assert {s.image_id for s in train} | {s.image_id for s in validation} == {s.image_id for s in samples}


def test_shuffling_is_seeded_and_mixes_the_classes():
    samples = _samples([0] * 50 + [1] * 50)
    mixed = shuffled(samples, 1)
    assert mixed == shuffled(samples, 1) != shuffled(samples, 2)
    assert sorted(s.image_id for s in mixed) == sorted(s.image_id for s in samples)
    assert 5 < sum(s.label for s in mixed[:30]) < 25


def test_classes_without_an_image_are_named():
    check_splits({"train": [1, 2], "test": [3, 4]}, ["ant", "bee"])
    with pytest.raises(CorpusError, match="split test has no image of bee"):
        check_splits({"train": [1, 2], "test": [3, 0]}, ["ant", "bee"])
