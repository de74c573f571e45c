"""The import rule, read from the source: downwards only, and every heavy library in its one place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("config", "columns"),
    ("artifacts", "storage"),
    ("sparse", "clustering", "attacks", "models", "corpus", "defenses"),
    ("purification",),
    ("training",),
    ("evaluation",),
    ("reporting",),
    ("distributed",),
    ("benchmark",),
    ("demo",),
    ("cli",),
    ("jobs",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

FORBIDDEN = ("torchvision", "timm", "pickle", "cPickle", "joblib", "dill", "cloudpickle")
PLACES = {
    "ray": ("acsr_ray/distributed/", "acsr_ray/cli.py", "jobs/"),
    "cuml": ("acsr_ray/clustering/kmeans_cuml.py",),
    "cupy": ("acsr_ray/clustering/kmeans_cuml.py", "acsr_ray/benchmark/peer_sporco.py"),
    "sporco": ("acsr_ray/sparse/cdl_sporco.py", "acsr_ray/benchmark/peer_sporco.py"),
    "numba": ("acsr_ray/sparse/patch_loops.py",),
    "matplotlib": ("acsr_ray/evaluation/figures.py",),
    "torchattacks": ("acsr_ray/attacks/torchattacks_adapter.py",),
}


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("acsr_ray/**/*.py"), *ROOT.glob("jobs/**/*.py")])


def part_of(name: str) -> str | None:
    """Return the part of the package that a dotted module name lies in, None outside the package."""
    root, _, rest = name.partition(".")
    return rest.split(".")[0] if root == "acsr_ray" and rest else None


def part_of_file(relative: str) -> str:
    first, second = relative.split("/")[:2]
    return "jobs" if first == "jobs" else second.removesuffix(".py")


def imported(tree: ast.AST, relative: str) -> Iterator[str]:
    """Yield the dotted names a file imports anywhere, also inside functions."""
    package = relative.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(relative: str, source: str) -> list[str]:
    """Return what a file imports against the rules."""
    found, here = [], part_of_file(relative)
    for name in imported(ast.parse(source), relative):
        library = name.split(".")[0]
        if library in FORBIDDEN:
            found.append(f"{relative} imports {library}")
        if library in PLACES and not relative.startswith(PLACES[library]):
            found.append(f"{relative} imports {library}")
        there = part_of(name)
        # `from acsr_ray import __version__`, and the package's own lazy `Purifier`.
        if there is None or there in ("__version__", here) or here == "__init__":
            continue
        if there not in LEVEL or LEVEL[there] >= LEVEL[here]:
            found.append(f"{relative} imports {name}: {here} is not above {there}")
    return found


def test_imports_go_downwards():
    files = [path.relative_to(ROOT).as_posix() for path in source_files()]
    assert len(files) > 30
    unknown = {part_of_file(name) for name in files} - LEVEL.keys() - {"__init__"}
    assert not unknown, f"parts without a layer: {unknown}"
    assert [line for name in files for line in violations(name, (ROOT / name).read_text())] == []


@pytest.mark.parametrize(
    ("relative", "source", "broken"),
    [
        ("acsr_ray/sparse/x.py", "from acsr_ray.models.classifier import encode", True),
        ("acsr_ray/models/x.py", "def f():\n    import acsr_ray.purification.tiles", True),
        ("acsr_ray/corpus/x.py", "from ..sparse import cdl", True),
        ("acsr_ray/purification/x.py", "from acsr_ray.training import loop", True),
        ("acsr_ray/training/x.py", "from acsr_ray.purification import bundle", False),
        ("acsr_ray/config.py", "from acsr_ray.columns import IMAGE", True),
        ("acsr_ray/purification/x.py", "import ray.data", True),
        ("acsr_ray/demo/x.py", "from ray import data", True),
        ("acsr_ray/clustering/kmeans.py", "import cupy", True),
        ("acsr_ray/artifacts.py", "import pickle", True),
        ("acsr_ray/evaluation/x.py", "from acsr_ray.corpus.images import encode_png", False),
        ("acsr_ray/distributed/x.py", "import ray\nfrom . import blocks", False),
        ("acsr_ray/training/x.py", "from acsr_ray import __version__", False),
        ("jobs/x.py", "from acsr_ray.cli import run_job", False),
    ],
)
def test_the_rule_itself(relative: str, source: str, broken: bool):
    assert bool(violations(relative, source)) == broken


def test_the_library_does_not_load_ray():
    code = (
        "import sys, acsr_ray; assert 'torch' not in sys.modules\n"
        "import acsr_ray.purification.stages, acsr_ray.training.robust\n"
        "bad = {'ray', 'cuml', 'cupy', 'torchattacks', 'torchvision'} & sys.modules.keys()\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
