"""A plan as text for people."""

from collections.abc import Mapping
from typing import Any

SHOWN_PROBLEMS = 20
BUSY = 1.15
"""Seconds of the clock per CPU second beyond which other programs are told of."""
UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def plan_table(plan: Mapping[str, Any]) -> str:
    """Return the plan's tables: corpus, sample, estimate and problems."""
    lines = ["corpus"]
    states = ", ".join(f"{count} {state}" for state, count in plan["shard_states"].items() if count)
    lines += _rows(
        ("images", f"{plan['images']:,}, {plan['images_to_do']:,} of them to do"),
        ("shards", f"{plan['shards']:,} ({states or 'none'})"),
        ("units to do", f"{plan['units_to_do']:,} of {plan['units']:,}"),
        ("row groups", f"{plan['row_groups']:,} in the footers that were read"),
        ("encoded", f"{_bytes(plan['bytes'])} in shards that are not as they were"),
    )
    if plan["images_maybe_done"]:
        lines += _rows(("unknown", f"{plan['images_maybe_done']:,} images may turn out to be done already"))
    if plan["removed_shards"]:
        lines += _rows(("gone", f"{plan['removed_shards']:,} shards left the input: their output goes too"))
    sample = plan["sample"]
    if sample["images"]:
        lines += ["", *_sample(sample)]
    lines += ["", *_estimate(plan)]
    return "\n".join([*lines, *_problems(plan["problems"])])


def _sample(sample: Mapping[str, Any]) -> list[str]:
    stages = sample["milliseconds_per_image"]
    costs = ", ".join(f"{stage} {value:.3g}" for stage, value in stages.items())
    sizes = ", ".join(f"{count} {edge}" for edge, count in sample["megapixels"].items())
    head = f"sample: {sample['images']} images of {sample['units']} units in {sample['seconds']:g} s"
    lines = [f"{head}, {sample['processes']} processes at once on {sample['device']}"]
    lines += _rows(
        ("ms per image", costs),
        ("megapixels", sizes),
        ("quarantined", str(sample["quarantined"])),
    )
    if sample["device"] == "cpu" and sample["slowed_by_others"] > BUSY:
        busy = f"others take part of this machine: {sample['slowed_by_others']:g} times the CPU time passed"
        lines += _rows(("busy", busy))
    return lines


def _estimate(plan: Mapping[str, Any]) -> list[str]:
    cluster, estimate = plan["cluster"], plan["estimate"]
    where = f"{cluster['cpus']:g} CPUs and {cluster['gpus']:g} GPUs on {cluster['nodes']} nodes"
    title = f"estimate for {where}" if cluster["nodes"] else "nothing to do"
    lines = [f"{title:46} {'mean':>10}   95 % interval"]
    shown = (
        ("time", estimate["seconds"], _seconds),
        ("images/s", estimate["images_per_s"], "{:.3g}".format),
        ("CPU-hours", estimate["cpu_hours"], "{:.3g}".format),
        ("GPU-hours", estimate["gpu_hours"], "{:.3g}".format),
        ("output", estimate["output_bytes"], _bytes),
        ("quarantined images", estimate["quarantined"], "{:.0f}".format),
        ("memory of the driver", estimate["memory_mib"]["driver"], "{:.0f} MiB".format),
        ("memory of a worker", estimate["memory_mib"]["worker"], "{:.0f} MiB".format),
        ("object stores", estimate["memory_mib"]["object_store"], "{:.0f} MiB".format),
    )
    for name, value, text in shown:
        lines.append(f"  {name:44} {text(value['mean']):>10}   {text(value['low'])} to {text(value['high'])}")
    return lines


def _problems(problems: list[Mapping[str, str]]) -> list[str]:
    if not problems:
        return []
    lines = ["", f"problems: {len(problems)}"]
    lines += [f"  {problem['code']}: {problem['message']}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - SHOWN_PROBLEMS} more, all of them in the JSON")
    return lines


def _rows(*rows: tuple[str, str]) -> list[str]:
    return [f"  {name:16} {value}" for name, value in rows]


def _seconds(value: float) -> str:
    for size, name in UNITS:
        if value >= 2 * size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} s"


def _bytes(value: float) -> str:
    for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if value >= 2**power:
            return f"{value / 2**power:.3g} {name}"
    return f"{value / 1024:.3g} KiB"
