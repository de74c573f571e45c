"""Carlini-Wagner: the optimum on a linear model, margins, the search for c, and all-negative logits."""

import torch

from acsr_ray.attacks.carlini_wagner import carlini_wagner
from acsr_ray.evaluation.quality import perturbation_norms


def test_the_nearest_point_is_found_on_a_linear_model():
    normal = torch.randn(48, generator=torch.Generator().manual_seed(4))
    normal = normal / normal.norm()
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 0.2 + 0.4
    lead = images.flatten(1) @ normal
    threshold = lead.min() - 0.2

    def model(x):
        score = x.flatten(1) @ normal - threshold
        return torch.stack([5 * score, torch.zeros_like(score)], 1)

    labels = torch.zeros(6, dtype=torch.int64)
    got = carlini_wagner(model, images, labels, c=1.0, steps=400, lr=0.01)
    assert (model(got).argmax(1) == 1).all()
    lengths = perturbation_norms(got, images, "l2").float()
    exact = lead - threshold
    assert (lengths >= exact - 1e-5).all()
    assert (lengths <= 1.05 * exact).all()


def test_success_and_margin(digits):
    images, labels = digits.head(60)
    plain = carlini_wagner(digits.model, images, labels)
    sure = carlini_wagner(digits.model, images, labels, kappa=2.0)
    for got, kappa in ((plain, 0.0), (sure, 2.0)):
        logits = digits.model(got)
        own = logits.gather(1, labels[:, None])[:, 0]
        lead = logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own
        assert (lead >= kappa).double().mean() > 0.95
        assert got.min() >= 0
        assert got.max() <= 1
    assert perturbation_norms(sure, images, "l2").mean() > perturbation_norms(plain, images, "l2").mean()


def test_the_search_for_c_shortens_the_perturbation_and_rescues_a_small_c(digits):
    images, labels = digits.head(16)
    single = carlini_wagner(digits.model, images, labels, c=20.0)
    searched = carlini_wagner(digits.model, images, labels, c=20.0, binary_search_steps=4)
    assert (digits.model(searched).argmax(1) != labels).all()
    lengths = [perturbation_norms(x, images, "l2") for x in (single, searched)]
    assert (lengths[1] <= lengths[0] + 1e-6).all()
    assert lengths[1].mean() < 0.95 * lengths[0].mean()
    timid = carlini_wagner(digits.model, images, labels, c=1e-3)
    rescued = carlini_wagner(digits.model, images, labels, c=1e-3, binary_search_steps=4)
    assert (digits.model(timid).argmax(1) != labels).double().mean() < 0.3
    assert (digits.model(rescued).argmax(1) != labels).double().mean() > 0.95


def test_a_common_shift_of_the_logits_changes_nothing(digits):
    images, labels = digits.head(20)
    plain = carlini_wagner(digits.model, images, labels, steps=40)
    # All logits negative: where zero stands in for a masked logit, the attack aims at nothing.
    shifted = carlini_wagner(lambda x: digits.model(x) - 100, images, labels, steps=40)
    lengths = [perturbation_norms(x, images, "l2").mean() for x in (plain, shifted)]
    assert (digits.model(shifted).argmax(1) != labels).all() == (
        digits.model(plain).argmax(1) != labels
    ).all()
    assert abs(lengths[0] - lengths[1]) < 0.02 * lengths[0]


def test_an_image_is_attacked_alike_alone_and_in_a_batch(digits):
    images, labels = digits.head(12)
    together = carlini_wagner(digits.model, images, labels)
    for n in range(0, 12, 3):
        alone = carlini_wagner(digits.model, images[n : n + 1], labels[n : n + 1])
        lengths = [perturbation_norms(x, images[n : n + 1], "l2") for x in (alone, together[n : n + 1])]
        torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-2, atol=1e-4)


def test_what_cannot_be_fooled_comes_back_unchanged():
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def stubborn(x):
        return torch.stack([10 + x.flatten(1).sum(1), x.flatten(1).sum(1)], 1)

    got = carlini_wagner(stubborn, images, torch.zeros(3, dtype=torch.int64), steps=20)
    assert torch.equal(got, images)
