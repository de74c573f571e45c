"""ACSR on Ray: distributed purification of image corpora against adversarial attacks.

`Purifier.load("cifar10-small")(images)` is the library in one line; `jobs/` holds the cluster jobs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acsr_ray.purification.options import PurifyOptions
    from acsr_ray.purification.purifier import Purifier

__all__ = ["Purifier", "PurifyOptions", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Lazy, so that `import acsr_ray` (and every `--help`) does not pay for importing torch.
    if name == "Purifier":
        from acsr_ray.purification.purifier import Purifier

        return Purifier
    if name == "PurifyOptions":
        from acsr_ray.purification.options import PurifyOptions

        return PurifyOptions
    raise AttributeError(f"module 'acsr_ray' has no attribute {name!r}")
