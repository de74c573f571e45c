"""A run at the real metrics endpoint of a local Ray: the numbers of its record, by the names of the code."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from acsr_ray.corpus.facts import UnitFacts
from acsr_ray.distributed.metrics import METRICS, PREFIX, RunMetrics

JOB = """
import sys
import ray
from acsr_ray.distributed.purify import purify_corpus
from acsr_ray.distributed.purify_settings import PurifyCorpusSettings

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
         _metrics_export_port=int(sys.argv[1]), _system_config={"metrics_report_interval_ms": 500})
purify_corpus(PurifyCorpusSettings(input=sys.argv[2], output=sys.argv[3], bundle=sys.argv[4], unit_rows=4))
print("done", flush=True)
sys.stdin.readline()
ray.shutdown()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scrape(port):
    """Return the samples of ours by name and own label: {(name, label value): number}, and kinds by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples, kinds = defaultdict(float), {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(f"{PREFIX}acsr_"):
            kinds[family.name] = family.type
            for sample in family.samples:
                label = next(
                    (sample.labels[key] for key in ("status", "reason", "stage") if key in sample.labels), ""
                )
                samples[sample.name.removeprefix(PREFIX), label] += sample.value
    return samples, kinds


@pytest.mark.ray
@pytest.mark.slow
def test_a_scrape_tells_what_the_record_tells(
    tmp_path, tiny_bundle, hf_table, write_parquet, smooth_pixels, encoded
):
    cells = [encoded(pixels) for pixels in smooth_pixels(10, 16, 16, seed=0)]
    cells[3], cells[7] = b"", None
    source = write_parquet(tmp_path / "in" / "a.parquet", hf_table(cells))
    port = free_port()
    command = [
        sys.executable,
        "-c",
        JOB,
        str(port),
        str(source.parent),
        str(tmp_path / "out"),
        str(tiny_bundle),
    ]
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "done\n"
        (path,) = (tmp_path / "out").glob("_acsr/runs/*/record.json")
        record = json.loads(path.read_text())
        ends = time.monotonic() + 60
        while True:
            samples, kinds = scrape(port)
            # The last report of all: the run has ended.
            if ("acsr_running", "") in samples and not samples["acsr_running", ""]:
                break
            assert time.monotonic() < ends, samples
            time.sleep(0.2)
    finally:
        job.communicate("\n", timeout=60)
    assert job.returncode == 0
    assert record["statuses"] == {"purified": 8, "quarantined": 2}
    assert record["reasons"] == {"empty": 1, "null_image": 1}
    for name, counts in (
        ("acsr_images_total", record["statuses"]),
        ("acsr_reasons_total", record["reasons"]),
        ("acsr_stage_busy_seconds_total", record["stage_seconds"]),
        ("acsr_stage_seconds_count", dict.fromkeys(record["stage_seconds"], record["units"])),
    ):
        found = {label: value for (of, label), value in samples.items() if of == name}
        assert found == pytest.approx(counts, abs=2e-3), name
    assert samples["acsr_units_total", ""] == record["units"] == 3
    assert samples["acsr_images_planned", ""] == 10
    assert samples["acsr_quarantine_rate", ""] == pytest.approx(0.2)
    assert samples["acsr_batch_fill", ""] == pytest.approx(record["batch_fill"], abs=1e-4)
    assert samples["acsr_eta_seconds", ""] == 0
    expected = {name: metric.kind for name, metric in METRICS.items()}
    for name in ("acsr_retries_total", "acsr_failed_units_total", "acsr_refused_shards_total"):
        del expected[name]  # nothing of the kind happened
    # The parser takes counters' ending for the format's own.
    told = {name.removeprefix(PREFIX): kind for name, kind in kinds.items()}
    assert {f"{name}_total" if kind == "counter" else name: kind for name, kind in told.items()} == expected


def test_nothing_is_reported_where_there_is_no_ray(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("acsr_ray.distributed.metrics.counter", lambda name: pytest.fail(name))
    monkeypatch.setattr("acsr_ray.distributed.metrics.gauge", lambda name: pytest.fail(name))
    metrics = RunMetrics()
    metrics.unit(UnitFacts({"purified": 1}))
    metrics.tick({"outcome": "running"})
