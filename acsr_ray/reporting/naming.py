"""The clusters of a run's bundle, by name: all that it has, so that those never chosen are seen too."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acsr_ray.artifacts import ArtifactError
from acsr_ray.corpus.ledger import BUNDLE, RUN
from acsr_ray.purification.bundle import bundle_digest, load_bundle
from acsr_ray.reporting.record import RunRecord
from acsr_ray.reporting.sampling import ClusterKey
from acsr_ray.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterNames:
    """What is known of the clusters."""

    class_names: tuple[str, ...] = ()
    clusters: tuple[ClusterKey, ...] = ()
    """All clusters of the bundle; empty where it cannot be loaded."""
    bundle: str = ""
    """Name of the bundle."""

    def label(self, key: ClusterKey) -> str:
        """Return a cluster's name."""
        class_id, cluster_id = key
        known = 0 <= class_id < len(self.class_names)
        return f"{self.class_names[class_id] if known else f'class {class_id}'} {cluster_id}"

    def key(self, recorded: str) -> ClusterKey | None:
        """Return the key of a cluster as records name it, `<class>/<cluster>`, by number or by name."""
        name, _, number = recorded.rpartition("/")
        if not (number.isascii() and number.isdecimal()):
            return None
        if name in self.class_names:
            return self.class_names.index(name), int(number)
        return (int(name), int(number)) if name.isascii() and name.isdecimal() else None


def deciding_settings(storage: Storage) -> dict[str, Any]:
    """Return the settings that an output is bound to, {} where they cannot be read."""
    return _json(storage, RUN)


def cluster_names(storage: Storage, record: RunRecord) -> ClusterNames:
    """Return the clusters of a run's bundle; only the names of the classes where it cannot be loaded."""
    described = _json(storage, BUNDLE).get("bundle")
    described = described if isinstance(described, Mapping) else {}
    names = described.get("class_names")
    known = tuple(str(name) for name in names) if isinstance(names, list) else ()
    bundle = str(described.get("name") or record.bundle)
    expected = deciding_settings(storage).get("bundle_digest")
    for location in filter(None, (record.bundle, described.get("name"))):
        try:
            if expected is not None and bundle_digest(str(location)) != expected:
                logger.info("bundle %s is not the one of the run", location)
                continue
            loaded = load_bundle(str(location))
        except (ArtifactError, OSError) as error:
            logger.info("bundle %s: %s", location, error)
            continue
        gaussians = loaded.gaussians
        keys = zip(gaussians.class_id.tolist(), gaussians.cluster_id.tolist(), strict=True)
        return ClusterNames(loaded.config.class_names, tuple(sorted(keys)), loaded.config.name)
    return ClusterNames(known, (), bundle)


def _json(storage: Storage, name: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read(name))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
