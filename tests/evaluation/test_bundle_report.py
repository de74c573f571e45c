"""The numbers of a bundle's report against their definitions, and its pictures."""

import numpy as np
import pytest
import torch

from acsr_ray.clustering.gaussians import fit_gaussians
from acsr_ray.evaluation import bundle_report as module
from acsr_ray.evaluation.bundle_report import (
    Measured,
    bundle_report,
    class_separation,
    cluster_separation,
    condition_numbers,
    draw_atoms,
    selection_table,
    wcss_table,
)
from acsr_ray.evaluation.selection_quality import SelectionOutcome


@pytest.fixture
def latents():
    """Two classes, of two and one clusters."""
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0, 0, 0], [3, 0, 0, 0], [0, 9, 0, 0]])
    which = rng.permutation(np.repeat([0, 1, 2], [60, 90, 50]))
    rows = centres[which] + rng.standard_normal((200, 4)) * [1, 2, 0.5, 1]
    return rows, np.array([0, 0, 1])[which], np.array([0, 1, 0])[which]


def test_separations_are_ratios_of_scatter(latents):
    rows, class_id, cluster_id = latents
    gaussians = fit_gaussians(rows, class_id, cluster_id, inverse="pinv")
    key = class_id * 2 + cluster_id
    own = np.stack([rows[key == k].mean(0) for k in key])
    of_class = np.stack([rows[class_id == c].mean(0) for c in class_id])
    within, between = ((rows - own) ** 2).sum(), ((own - of_class) ** 2).sum()
    classes = ((of_class - rows.mean(0)) ** 2).sum()
    assert cluster_separation(gaussians) == pytest.approx(between / within)
    assert class_separation(gaussians) == pytest.approx(classes / (within + between))


def test_condition_numbers_are_those_of_the_covariances(latents):
    rows, class_id, cluster_id = latents
    found = condition_numbers(fit_gaussians(rows, class_id, cluster_id, inverse="pinv"))
    expected = [
        np.linalg.cond(np.cov(rows[(class_id == c) & (cluster_id == k)].T))
        for c, k in ((0, 0), (0, 1), (1, 0))
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_condition_of_a_flat_cluster_is_that_of_its_range(latents):
    rows, class_id, cluster_id = latents
    flat = np.concatenate([rows, rows[:, :1]], 1)
    found = condition_numbers(fit_gaussians(flat, class_id, cluster_id, inverse="pinv"))
    assert (found < 1e4).all()


def test_atoms_are_tiles_around_grey():
    atoms = torch.zeros(18, 3, 5, 4)
    atoms[0, 0, 0, 0] = 2.0
    atoms[17, 2, 4, 3] = -0.1
    picture = draw_atoms(atoms)
    assert picture.shape == (2 * 6 - 1, 16 * 5 - 1, 3)
    assert picture[0, 0].tolist() == [255, 128, 128]
    assert picture[10, 8].tolist() == [128, 128, 0]
    assert picture[5].min() == 255


OUTCOME = SelectionOutcome(
    np.array([True, True, True, False]),
    np.array([True, False, False, False]),
    np.array([True, False, True, False]),
)


def test_the_chosen_way_is_marked_and_no_other():
    entries = [
        Measured("f_bsl", "baseline", "tied", OUTCOME),
        Measured("f_rob", "baseline", "tied", OUTCOME),
        Measured("f_rob", "robust", "tied", OUTCOME),
    ]
    table = selection_table(entries, ("baseline", "tied"), "l2 0.3")
    assert [row[2] for row in table.rows] == ["tied", "tied (chosen)", "tied"]
    assert table.rows[0][3].startswith("75.0 [")
    assert OUTCOME.score == pytest.approx(0.5)


CURVES = {
    "0": {"wcss": [8.0, 4.0, 3.0], "blob_wcss": [8.0, 6.0, 5.0], "elbow": 2, "clusters": 1},
    "1": {"wcss": [5.0], "blob_wcss": [5.0], "elbow": 1, "clusters": 1},
}


def test_wcss_are_shares_of_the_first():
    table = wcss_table(CURVES)
    assert table.rows[0] == ("0", "2", "1", "1.000 (1.000)", "0.500 (0.750)", "0.375 (0.625)")
    assert table.rows[1][3:] == ("1.000 (1.000)", "", "")


def test_the_page_needs_no_matplotlib(latents, monkeypatch):
    rows, class_id, cluster_id = latents
    gaussians = fit_gaussians(rows, class_id, cluster_id)
    atoms = torch.randn(3, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def page():
        return bundle_report(
            "b",
            ["ant", "<bee>"],
            {"classes": CURVES},
            {"baseline": gaussians},
            [],
            ("baseline", "tied"),
            atoms,
            "",
        )

    whole = page()
    assert whole.count("<img") == 4
    assert "&lt;bee&gt; 0" in whole

    def missing(*_):
        raise module.MissingExtraError("matplotlib is not installed")

    monkeypatch.setattr(module, "wcss_figure", missing)
    assert page().count("<img") == 3
    assert "matplotlib is not installed" in page()
