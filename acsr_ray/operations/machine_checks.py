"""What is looked at on the machine itself: versions, extras, memory, the bundle, the decoding process."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
import psutil
import torch
from packaging.requirements import Requirement

from acsr_ray.artifacts import ArtifactError
from acsr_ray.config import AcsrError
from acsr_ray.corpus.images import DecodeLimits, encode_png
from acsr_ray.corpus.isolated import DecoderSettings, IsolatedDecoder
from acsr_ray.corpus.refusals import ImageError
from acsr_ray.distributed.probe import check_switches
from acsr_ray.filesystems import EXTRAS as STORE_EXTRAS
from acsr_ray.operations.finding import Finding
from acsr_ray.purification.bundle import bundle_digest, load_bundle

OLDEST_PYTHON, NEWEST_TRIED = (3, 11), (3, 12)
SHOWN_VERSIONS = ("ray", "torch", "pyarrow", "numpy", "pillow")
EXTRAS = {
    "s3": ("s3fs", "object stores"),
    "gs": ("gcsfs", "input from Google's storage"),
    "hf": ("huggingface_hub", "input from the Hub"),
    "delta": ("deltalake", "the output as a Delta table"),
    "art": ("art", "the purifier in the Adversarial Robustness Toolbox"),
    "attacks": ("torchattacks", "attacks of the demo, of sweeps and of training"),
    "evaluation": ("matplotlib", "figures and rivals' defences"),
    "sporco": ("sporco", "the other learner of dictionaries"),
    "gpu": ("cupy", "k-means on GPUs"),
}
"""Extra -> (a package of it, what it is for)."""
SHARED_MEMORY = Path("/dev/shm")


def check_python(running: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    """Look at the interpreter's version."""
    told = ".".join(map(str, running))
    if running < OLDEST_PYTHON:
        return Finding("python", "fail", told, "install Python 3.11 or 3.12")
    if running[:2] > NEWEST_TRIED:
        return Finding("python", "warn", told, "tried with 3.11; 3.12 should do")
    return Finding("python", "ok", told)


def check_requirements(package: str = "acsr-ray") -> Iterator[Finding]:
    """Compare what is installed with what the package asks for."""
    try:
        asked = [Requirement(text) for text in requires(package) or ()]
    except PackageNotFoundError:
        yield Finding("packages", "warn", f"{package} is not installed, only on the path", "pip install it")
        return
    wrong, shown = [], []
    for requirement in asked:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found}, asked for {requirement.specifier}")
        if requirement.name.lower() in SHOWN_VERSIONS:
            shown.append(f"{requirement.name} {found}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), f"pip install '{package}' again, in a clean venv")
    else:
        yield Finding("packages", "ok", ", ".join(shown))


def check_unsafe(environment: Mapping[str, str]) -> Finding:
    """Look for switches that let data files run code, and for a Ray that is too old."""
    try:
        return Finding("unsafe switches", "ok", f"none, Ray {check_switches(environment)}")
    except AcsrError as error:
        return Finding("unsafe switches", "fail", str(error), "no job starts like this")


def check_extras(*locations: str | None) -> Iterator[Finding]:
    """Look for optional packages; one that an input or output needs must be there."""
    protocols = {place.partition("://")[0] for place in locations if place and "://" in place}
    needed = {STORE_EXTRAS[protocol] for protocol in protocols & STORE_EXTRAS.keys()}
    there = [name for name, (package, _) in EXTRAS.items() if importlib.util.find_spec(package) is not None]
    for name in sorted(needed - set(there)):
        purpose = EXTRAS[name][1]
        yield Finding("extra", "fail", f"{name} is missing, for {purpose}", f"pip install 'acsr-ray[{name}]'")
    absent = [name for name in EXTRAS if name not in there]
    yield Finding("extras", "ok", f"{', '.join(there) or 'none'}; without {', '.join(absent) or 'none'}")


def check_memory(object_store_megabytes: int) -> Finding:
    """Look at memory, and at the room that a local Ray's object store takes of it."""
    memory = psutil.virtual_memory()
    device = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    free, whole = memory.available / 2**30, memory.total / 2**30
    told = f"{free:.1f} of {whole:.1f} GiB, {psutil.cpu_count()} CPUs, {device}"
    shared = psutil.disk_usage(str(SHARED_MEMORY)).free / 2**20 if SHARED_MEMORY.is_dir() else None
    if shared is not None and shared < object_store_megabytes:
        hint = f"Ray's object store takes {object_store_megabytes} MiB there: give the container --shm-size"
        return Finding("memory", "warn", f"{told}; /dev/shm has {shared:.0f} MiB", hint)
    if memory.available < 2 * 2**30:
        return Finding("memory", "warn", told, "a worker takes about 1 GiB: fewer --ray.actors")
    return Finding("memory", "ok", told)


def check_bundle(location: str) -> Finding:
    """Load the bundle, which checks every digest."""
    try:
        bundle = load_bundle(location)
        digest = bundle_digest(location)[:12]
    except ArtifactError as error:
        return Finding("bundle", "fail", str(error), "name a bundle's directory or a packaged one")
    config = bundle.config
    return Finding(
        "bundle", "ok", f"{config.name} {digest}, {len(bundle.atoms)} clusters, {config.reconstruction}"
    )


def check_decoder(limits: DecodeLimits, settings: DecoderSettings) -> Finding:
    """Decode one image in a child process, as the job does."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    try:
        with IsolatedDecoder(limits, settings) as decoder:
            decoded = decoder.decode(encode_png(pixels))
    except (AcsrError, ImageError) as error:
        return Finding("decoder", "fail", str(error), "the decoding process does not work here")
    if not np.array_equal(decoded, pixels):
        return Finding("decoder", "fail", "an image came back changed", "check the installation of Pillow")
    return Finding(
        "decoder", "ok", f"decodes in a process of its own, {settings.memory_megabytes} MiB at most"
    )
