"""The report of a bundle: how its clusters were found, how far apart they are, what they select and hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acsr_ray.clustering.gaussians import Gaussians
from acsr_ray.clustering.selection import SelectionRule
from acsr_ray.config import MissingExtraError
from acsr_ray.evaluation.figures import wcss_figure
from acsr_ray.evaluation.report import Panel, Picture, Section, html_report
from acsr_ray.evaluation.selection_quality import SelectionOutcome
from acsr_ray.evaluation.tables import Table

GAP = 1
"""Pixels between atoms."""
DRAWN_CLASSES = 12
"""Curves that one figure can show; the table has all."""


@dataclass(frozen=True)
class Measured:
    """One way to select clusters and what it did on held-out images."""

    encoder: str
    """`f_bsl` or `f_rob`."""
    origin: str
    """Network whose latents the Gaussians were fitted on."""
    rule: SelectionRule
    outcome: SelectionOutcome


def bundle_report(
    name: str,
    class_names: Sequence[str],
    semantics: Mapping[str, Any],
    gaussians: Mapping[str, Gaussians],
    measured: Sequence[Measured],
    chosen: tuple[str, SelectionRule],
    atoms: Tensor,
    attack: str,
) -> str:
    """Return the page.

    Args:
        name: of the bundle.
        class_names: by class id.
        semantics: manifest of the semantics, with the WCSS of each class.
        gaussians: by the network whose latents they were fitted on, one covariance per cluster.
        measured: selection on held-out images.
        chosen: origin and rule of the bundle.
        atoms: (K, M, 3, h, w), in the order of the Gaussians.
        attack: what the attacked images are.
    """
    first = next(iter(gaussians.values()))
    keys = [
        f"{class_names[class_id]} {cluster_id}"
        for class_id, cluster_id in zip(first.class_id.tolist(), first.cluster_id.tolist(), strict=True)
    ]
    pictures: tuple[Picture, ...] = ()
    # Shards may not know the names; the classes come in the order of their ids either way.
    found = semantics["classes"]
    curves = dict(zip(class_names if len(class_names) == len(found) else found, found.values(), strict=True))
    notes: tuple[str, ...] = ()
    try:
        drawn = dict(list(curves.items())[:DRAWN_CLASSES])
        pictures = (Picture(f"WCSS of {len(drawn)} of {len(curves)} classes.", wcss_figure(drawn)),)
    except MissingExtraError as error:
        notes = (f"Without a figure: {error}",)
    sections = (
        Section(
            "Clusters per class",
            paragraphs=(
                "Blob: what the same k leaves of the WCSS of one Gaussian of the class's covariance. A split "
                "that saves no more than the blob's shows no clusters, only that k-means cuts anything.",
                *notes,
            ),
            tables=(wcss_table(curves),),
            figures=pictures,
        ),
        Section("Separation of the latents", tables=(separation_table(gaussians),)),
        Section("Gaussians", tables=(condition_table(keys, gaussians),)),
        Section("Selection", tables=(selection_table(measured, chosen, attack),) if measured else ()),
        Section(
            "Dictionaries",
            panels=tuple(
                Panel(f"Atoms of {key}", draw_atoms(own)) for key, own in zip(keys, atoms, strict=True)
            ),
        ),
    )
    return html_report(f"Bundle {name}", sections)


def wcss_table(curves: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the WCSS of every class by k, the blob's in brackets, as shares of the WCSS at k = 1."""
    most = max(len(curve["wcss"]) for curve in curves.values())
    rows = []
    for name, curve in curves.items():
        wcss = curve["wcss"]
        whole = wcss[0] or 1.0
        cells = [
            f"{value / whole:.3f} ({blob / whole:.3f})"
            for value, blob in zip(wcss, curve["blob_wcss"], strict=True)
        ]
        rows.append((name, str(curve["elbow"]), str(curve["clusters"]), *cells, *[""] * (most - len(cells))))
    header = ("class", "elbow", "clusters", *(f"k = {k}" for k in range(1, most + 1)))
    caption = "Share of the WCSS at k = 1, that of a Gaussian blob in brackets; clusters after merging."
    return Table("WCSS", caption, header, tuple(rows))


def separation_table(gaussians: Mapping[str, Gaussians]) -> Table:
    """Return between over within scatter, of classes and of clusters, for every network's latents."""
    rows = tuple(
        (f"latents of {origin}", f"{class_separation(own):.3f}", f"{cluster_separation(own):.3f}")
        for origin, own in gaussians.items()
    )
    caption = (
        "Scatter between the means over mean scatter within. Clusters: means around their class's mean, so "
        "a class of one cluster adds none."
    )
    return Table("Between over within", caption, ("", "classes", "clusters of a class"), rows)


def class_separation(gaussians: Gaussians) -> float:
    """Return the trace of the scatter between class means over that within classes."""
    between_clusters = float((_weights(gaussians) * _spread(gaussians)[1]).sum())
    classes = float((_weights(gaussians) * _spread(gaussians)[0]).sum())
    return classes / (within_scatter(gaussians) + between_clusters)


def cluster_separation(gaussians: Gaussians) -> float:
    """Return the trace of the scatter of clusters around their class's mean over that within clusters."""
    return float((_weights(gaussians) * _spread(gaussians)[1]).sum()) / within_scatter(gaussians)


def within_scatter(gaussians: Gaussians) -> float:
    """Return the mean trace of the clusters' covariances, weighted by their images."""
    roots = torch.linalg.pinv(gaussians.whitening.double())
    return float((_weights(gaussians) * roots.square().sum((1, 2))).sum())


def _weights(gaussians: Gaussians) -> Tensor:
    return gaussians.count.double() / gaussians.count.sum()


def _spread(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    """Return per cluster the squared distances (K,) class mean to overall mean, and cluster to class mean."""
    weights, means = _weights(gaussians), gaussians.mean.double()
    overall = (weights[:, None] * means).sum(0)
    of_class = torch.empty_like(means)
    for label in gaussians.class_id.unique():
        mine = gaussians.class_id == label
        of_class[mine] = (weights[mine, None] * means[mine]).sum(0) / weights[mine].sum()
    return (of_class - overall).square().sum(1), (means - of_class).square().sum(1)


def condition_numbers(gaussians: Gaussians) -> NDArray[np.float64]:
    """Return the condition number (K,) of every covariance; of its range, where it was pseudo-inverted."""
    values = torch.linalg.svdvals(gaussians.whitening.double())
    smallest = torch.where(values > values[:, :1] * 1e-10, values, torch.inf).min(1).values
    return ((values[:, 0] / smallest) ** 2).numpy()


def condition_table(keys: Sequence[str], gaussians: Mapping[str, Gaussians]) -> Table:
    """Return images and condition number of every cluster."""
    conditions = [condition_numbers(own) for own in gaussians.values()]
    counts = next(iter(gaussians.values())).count.tolist()
    rows = tuple(
        (key, str(count), *(f"{own[k]:.3g}" for own in conditions))
        for k, (key, count) in enumerate(zip(keys, counts, strict=True))
    )
    header = ("cluster", "images", *(f"condition, latents of {origin}" for origin in gaussians))
    return Table("Condition of the covariances", "After shrinkage where it is on.", header, rows)


def selection_table(measured: Sequence[Measured], chosen: tuple[str, SelectionRule], attack: str) -> Table:
    """Return the shares of every way to select, with Wilson intervals; the bundle's own is marked."""
    rows = tuple(
        (
            entry.encoder,
            f"latents of {entry.origin}",
            entry.rule + (" (chosen)" if _is_chosen(entry, chosen) else ""),
            *entry.outcome.cells(),
        )
        for entry in measured
    )
    count = len(measured[0].outcome.same)
    header = (
        "encoder",
        "Gaussians",
        "rule",
        "own class, clean",
        "own class, attacked",
        "same cluster under attack",
    )
    caption = f"{count} validation images; {attack}, on each encoder itself. Percent [Wilson 95 %]."
    return Table("Selected clusters", caption, header, rows)


def _is_chosen(entry: Measured, chosen: tuple[str, SelectionRule]) -> bool:
    return entry.encoder == "f_rob" and (entry.origin, entry.rule) == chosen


def draw_atoms(atoms: Tensor) -> NDArray[np.uint8]:
    """Return one dictionary (M, 3, h, w) as a picture (height, width, 3) of rows of 16 atoms.

    Zero is grey, and every atom is scaled to its own largest value.
    """
    count, _, height, width = atoms.shape
    columns = min(16, count)
    rows = -(-count // columns)
    picture = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    scaled = atoms / atoms.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    pixels = (127.5 + 127.5 * scaled).round().byte().permute(0, 2, 3, 1).numpy()
    for position, atom in enumerate(pixels):
        top, left = position // columns * (height + GAP), position % columns * (width + GAP)
        picture[top : top + height, left : left + width] = atom
    return picture
