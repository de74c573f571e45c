"""Look over everything a purification needs before a night depends on it: one line per thing, with a hint."""

import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from acsr_ray.corpus.images import DecodeLimits
from acsr_ray.corpus.isolated import DecoderSettings
from acsr_ray.distributed.runtime import RaySettings
from acsr_ray.filesystems import StoreSettings, over_stores
from acsr_ray.operations.finding import Finding
from acsr_ray.operations.machine_checks import (
    check_bundle,
    check_decoder,
    check_extras,
    check_memory,
    check_python,
    check_requirements,
    check_unsafe,
)
from acsr_ray.operations.place_checks import check_cluster, check_input, check_output
from acsr_ray.purification.bundle import DEFAULT_BUNDLE
from acsr_ray.storage import patience

DEADLINE_S = 10.0
"""Of each operation on a store: who asks whether one answers does not wait as long as a run does."""


class DoctorSettings(StoreSettings):
    """Check versions, bundle, decoder, storage, input, cluster and room; exit 1 where something fails."""

    sections: ClassVar[tuple[str, ...]] = ("purify_corpus",)
    borrows: ClassVar[bool] = True

    output: str | None = None
    """Folder or URI that is to be written; a probe is written there and removed."""
    input: str | None = None
    """Corpus that is to be read; it is listed, and its first shard opened."""
    bundle: str = DEFAULT_BUNDLE
    """What is to purify."""
    image_column: str = "image"
    """Column with the images."""
    min_free_megabytes: int = 256
    """Room that must be left on the output's disk."""
    decode: DecodeLimits = DecodeLimits()
    """Limits on images."""
    decoder: DecoderSettings = DecoderSettings()
    """Bounds on the process that decodes."""
    ray: RaySettings = RaySettings()
    """The cluster that is to be joined."""

    def render(self, summary: Mapping[str, Any]) -> str:
        """Return a table, hints under what is not as it should be."""
        lines = []
        for check in summary["checks"]:
            lines.append(f"{check['level']:4}  {check['name']:16} {check['told']}")
            if check["hint"]:
                lines.append(f"{'':6}{'':16} -> {check['hint']}")
        return "\n".join(lines)


@over_stores
def examine(settings: DoctorSettings) -> dict[str, Any]:
    """Return every check with its level (`ok`, `warn`, `fail`), what was found and a hint.

    Where one fails, `exit_code` is 1 and `error` says which.
    """
    with patience(DEADLINE_S):
        found = list(findings(settings))
    failed = [finding.name for finding in found if finding.level == "fail"]
    told: dict[str, Any] = {
        "checks": [finding.to_dict() for finding in found],
        "warnings": sum(finding.level == "warn" for finding in found),
    }
    if failed:
        told |= {"error": f"not ready: {', '.join(failed)}", "exit_code": 1}
    return told


def findings(settings: DoctorSettings) -> Iterator[Finding]:
    """Yield the checks, those that need the least first."""
    yield check_python()
    yield from check_requirements()
    yield check_unsafe(os.environ)
    yield from check_extras(settings.input, settings.output)
    yield check_memory(settings.ray.object_store_megabytes)
    yield check_bundle(settings.bundle)
    yield check_decoder(settings.decode, settings.decoder)
    if settings.output is not None:
        yield from check_output(settings.output, settings.min_free_megabytes)
    if settings.input is not None:
        yield check_input(settings.input, settings.image_column)
    yield check_cluster(settings.ray.address or os.environ.get("RAY_ADDRESS"))
