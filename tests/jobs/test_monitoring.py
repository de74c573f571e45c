"""Dashboard and alarms: they ask for the metrics that there are, all of them; each alarm says what to do."""

import json
import re
from pathlib import Path

import pytest
import yaml

from acsr_ray.distributed.metrics import GAUGES, METRICS, PREFIX, TOTALS

DEPLOY = Path(__file__).parents[2] / "jobs" / "deploy"
OPERATOR = "kuberay_job_deployment_status"
"""Of KubeRay's operator, for what no driver of ours can tell."""
SUFFIXES = re.compile("_(bucket|sum|count)$")


def asked_for(expression):
    """Return the metrics of ours that an expression names, without what Prometheus adds to histograms."""
    found = re.findall(rf"\b{PREFIX}(acsr_\w+)", expression)
    return {SUFFIXES.sub("", name) if name not in METRICS else name for name in found}


@pytest.fixture(scope="module")
def board():
    return json.loads((DEPLOY / "grafana" / "acsr_ray.json").read_text())


@pytest.fixture(scope="module")
def rules():
    content = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    (group,) = content["groups"]
    return group["rules"]


def expressions(board):
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_every_metric_is_there_and_is_looked_at(board, rules):
    shown = set().union(*map(asked_for, expressions(board)))
    watched = set().union(*(asked_for(rule["expr"]) for rule in rules))
    assert shown <= METRICS.keys()
    assert watched <= METRICS.keys()
    assert shown | watched == METRICS.keys()
    for text in [*expressions(board), *(rule["expr"] for rule in rules)]:
        assert asked_for(text) or OPERATOR in text, f"{text} asks for nothing of ours"
        assert "acsr_" not in text.replace(f"{PREFIX}acsr_", ""), "Ray puts its prefix in front"


def test_functions_fit_the_kind_of_metric(board, rules):
    for text in [*expressions(board), *(rule["expr"] for rule in rules)]:
        for name in re.findall(rf"(?:rate|increase)\({PREFIX}(\w+)", text):
            kind = METRICS[SUFFIXES.sub("", name)].kind
            assert kind == ("histogram" if name.endswith("_bucket") else "counter"), name
        for name, labels in re.findall(rf"\b{PREFIX}(\w+){{([^}}]*)}}", text):
            used = set(re.findall(r"(\w+)=", labels)) - {"SessionName"}
            assert used <= set(METRICS[SUFFIXES.sub("", name)].tags), text


def test_a_counter_that_begins_high_is_seen(rules):
    """To Prometheus it has not increased, and Ray's counters cannot begin at 0."""
    increases = [
        (rule["expr"], *re.search(r"increase\((\w+)\[(\w+)\]\) > (\d+)", rule["expr"]).groups())
        for rule in rules
        if "increase(" in rule["expr"]
    ]
    assert increases
    for text, name, window, limit in increases:
        assert f"or ({name} > {limit} unless {name} offset {window})" in text


def test_alarms_of_the_night_are_about_the_runs_of_the_schedule(rules):
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    found = [rule["expr"] for rule in rules if OPERATOR in rule["expr"]]
    assert len(found) == 2
    for text in found:
        names = set(re.findall(r'name=~"([^"]+)"', text))
        assert names == {job["metadata"]["generateName"] + ".*"}


def test_the_readme_has_every_alarm(rules):
    text = (DEPLOY.parents[1] / "README.md").read_text()
    rows = re.findall(r"^\| `(Acsr\w+)` \|", text, re.MULTILINE)
    assert rows == [rule["alert"] for rule in rules]


def test_counters_are_named_as_prometheus_wants_them():
    for name, metric in METRICS.items():
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert metric.help.endswith(".")
        assert len(metric.tags) <= 1
        assert set(metric.tags) <= {"status", "reason", "stage"}, "labels with few values only"
    assert all(METRICS[name].kind == "counter" for name in TOTALS)
    assert all(METRICS[name].kind == "gauge" for name in GAUGES)


def test_panels_have_units_and_places_of_their_own(board):
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = set()
    for panel in board["panels"]:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert all(target["legendFormat"] for target in panel["targets"])
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & places, f"{panel['title']} lies over another panel"
        places |= cells
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", json.dumps([board["panels"]]))) - {"__rate_interval"}
    assert used <= variables


def test_every_alarm_has_a_runbook(rules):
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names) >= 5
    for rule in rules:
        assert rule["alert"].startswith("Acsr")
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert len(rule["annotations"]["runbook"]) > 40
        assert "\n" not in rule["annotations"]["runbook"].strip()
        assert rule["annotations"]["summary"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
