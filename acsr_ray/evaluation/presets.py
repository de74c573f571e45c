"""The paper's tables and figures, and two of ours, as grids (METHOD, section 8), in two sizes.

`small` is for two CPU cores: quarter-width targets, 200 images or fewer (gray-box: 2,000 and a ResNet-9), BIM
of 20 and CW of 50 steps, CW without binary search. `full` is for GPUs: full width, the whole test split. Each
preset names its artifacts below one folder; `recipe` knows the command that makes each of them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from acsr_ray.evaluation.grid import Grid, GridError
from acsr_ray.evaluation.own_grids import adaptive, graybox
from acsr_ray.evaluation.paper_grids import figure2, figure3, figure4, table1, table2, table3, table4, table5
from acsr_ray.evaluation.purifier_grids import (
    ablations,
    purifier,
    purifier_adaptive,
    purifier_calibrated,
    purifier_filter,
    purifier_imagenet,
)
from acsr_ray.evaluation.recipes import Place, Variant, needed_artifacts, recipe

PRESETS: Mapping[str, Callable[[Place], Grid]] = {
    "table 1": table1,
    "table 2": table2,
    "table 3": table3,
    "table 4": lambda place: table4(place, 64),
    "table 4-128": lambda place: table4(place, 128),
    "table 5": table5,
    "table adaptive": adaptive,
    "table graybox": graybox,
    "table purifier": purifier,
    "table purifier-b0": purifier_calibrated,
    "table purifier-imagenet": purifier_imagenet,
    "table purifier-filter": purifier_filter,
    "table purifier-ablations": ablations,
    "table purifier-adaptive": purifier_adaptive,
    "figure 2": figure2,
    "figure 3": figure3,
    "figure 4": figure4,
}


def preset_grid(name: str, variant: Variant, data: Path, artifacts: Path, bundle: str) -> Grid:
    """Return the grid of a table or figure, named as in `PRESETS`.

    Args:
        name: which.
        variant: `small` or `full`.
        data: folder that holds the data sets' folders.
        artifacts: folder that holds targets, bundles and trained defences.
        bundle: bundle of CIFAR-10.

    Raises:
        GridError: shards or artifacts are missing; the message holds the commands that make them.
    """
    place = Place(variant, data, artifacts, bundle)
    grid = PRESETS[name](place)
    missing = [path for path in needed_artifacts(grid, place) if not (path / "manifest.json").exists()]
    if missing:
        commands = [line for path in missing for line in recipe(path, place)]
        raise GridError(
            f"{name} ({variant}) needs artifacts that are not there; make them with\n  "
            + "\n  ".join(dict.fromkeys(commands))
        )
    return grid
