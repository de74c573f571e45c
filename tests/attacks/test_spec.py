"""The settings of an attack: what is refused, what is filled in, what people read."""

import pytest
from pydantic import ValidationError

from acsr_ray.attacks.spec import ATTACKS, MINIMAL_NORM, AttackConfig
from acsr_ray.attacks.threat import ThreatModel


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "fgms", "epsilon": 0.1}, "unknown attack 'fgms', did you mean 'fgsm'"),
        ({"name": "zzz"}, "known: noise, fgsm"),
        ({"name": "torchattack.PGD"}, "unknown attack"),
        ({"name": "bim"}, "bim needs epsilon"),
        ({"name": "square"}, "square needs epsilon"),
        ({"name": "bim", "epsilon": 0.0}, "greater than 0"),
        ({"name": "bim", "epsilon": 0.1, "norm": "l1"}, "'linf', 'l2' or 'relative_l2'"),
        ({"name": "cw", "epsilon": 0.1}, "cw is capped in norm l2 or relative_l2"),
        ({"name": "deepfool", "norm": "linf", "epsilon": 0.1}, "deepfool is capped"),
        ({"name": "fgsm", "epsilon": 0.1, "steps": 10}, "fgsm does not take steps"),
        ({"name": "cw", "overshoot": 0.5}, "cw does not take overshoot; it takes steps, c, kappa"),
        ({"name": "pgd", "epsilon": 0.1, "options": {"eps": 1}}, "pgd does not take options"),
        ({"name": "torchattacks.PGD", "queries": 10}, "does not take queries"),
        ({"name": "cw", "strengths": [{"overshoot": 1.0}]}, "a strength of cw is {kappa: number}"),
        ({"name": "deepfool", "strengths": [{"overshoot": "much"}]}, "{overshoot: number}"),
        ({"name": "bim", "epsilon": 0.1, "strengths": []}, "bim does not take strengths"),
        ({"name": "pgd", "epsilon": 0.1, "epsilo": 1}, "epsilo"),
    ],
)
def test_bad_settings_say_what_is_wrong(given, message):
    with pytest.raises(ValidationError, match=message.replace("{", r"\{").replace("}", r"\}")):
        AttackConfig(**given)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_survives_its_manifest(name):
    epsilon = None if name in MINIMAL_NORM else 0.1
    config = AttackConfig(name=name, epsilon=epsilon)
    assert AttackConfig.from_description(config.describe()) == config
    capped = AttackConfig(name=name, norm="relative_l2", epsilon=0.04)
    assert capped.threat == ThreatModel("relative_l2", 0.04)


def test_defaults_are_the_documented_ones():
    bim = AttackConfig(name="bim", epsilon=0.04, norm="relative_l2")
    assert bim.num_steps == 100
    assert bim.step == pytest.approx(2.5 * 0.04 / 100)
    cw = AttackConfig(name="cw")
    assert (cw.c, cw.kappa, cw.num_steps, cw.lr, cw.binary_search_steps) == (1.0, 0.0, 100, 0.01, 0)
    assert cw.threat is None
    deepfool = AttackConfig(name="deepfool")
    assert (deepfool.num_steps, deepfool.overshoot) == (100, 0.02)


def test_the_ladder_only_rises():
    kappas = [rung["kappa"] for rung in AttackConfig(name="cw", kappa=3.0).ladder]
    assert kappas == sorted(kappas)
    assert min(kappas) > 3.0
    overshoots = [rung["overshoot"] for rung in AttackConfig(name="deepfool").ladder]
    assert overshoots == sorted(overshoots)
    assert min(overshoots) > 0.02
    assert AttackConfig(name="deepfool", strengths=()).ladder == ()
    assert AttackConfig(name="bim", epsilon=0.1).ladder == ()


def test_another_radius_scales_an_explicit_step():
    config = AttackConfig(name="bim", epsilon=0.1, step_size=0.02)
    assert config.with_epsilon(0.05).step == pytest.approx(0.01)
    assert AttackConfig(name="bim", epsilon=0.1).with_epsilon(0.05).step == pytest.approx(0.00125)


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ({"name": "bim", "norm": "relative_l2", "epsilon": 0.04}, "BIM l2rel .04 x100"),
        ({"name": "fgsm", "epsilon": 8 / 255}, "FGSM linf 8/255"),
        ({"name": "apgd", "epsilon": 0.03, "loss": "dlr", "restarts": 3}, "APGD-DLR linf .03 x100 r3"),
        ({"name": "cw"}, "CW x100"),
        ({"name": "cw", "kappa": 2, "norm": "l2", "epsilon": 1.5}, "CW l2 1.5 x100 kappa 2"),
        ({"name": "square", "norm": "l2", "epsilon": 0.5, "queries": 200}, "Square l2 .5 200q"),
        ({"name": "torchattacks.FAB", "epsilon": 4 / 255}, "torchattacks.FAB linf 4/255"),
    ],
)
def test_labels_are_short(given, label):
    assert AttackConfig(**given).label == label
