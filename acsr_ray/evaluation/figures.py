"""Figures of the report as PNG bytes, drawn without a display; the same data gives the same bytes.

Accuracies are `Share`s and drawn in percent. Every function takes `svg`, a path to also save the figure to.
matplotlib is in the optional extra `evaluation`; without it every function raises `MissingExtraError`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acsr_ray.artifacts import atomic_write
from acsr_ray.evaluation.extras import load_extra
from acsr_ray.evaluation.intervals import Share
from acsr_ray.evaluation.statistics import RiskCoverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; the markers and dashes also tell in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
DPI = 110


@dataclass(frozen=True)
class StrengthCurve:
    """One line of an attack-strength figure: a defence or a target."""

    label: str
    points: tuple[tuple[float, Share], ...]
    """(budget, accuracy), drawn in ascending order."""


@dataclass(frozen=True)
class TradeOff:
    """One line of a trade-off figure: a defence at several strengths."""

    label: str
    points: tuple[tuple[Share, Share], ...]
    """(clean accuracy, attacked accuracy) of each strength, joined in this order."""


@dataclass(frozen=True)
class Reference:
    """A horizontal line of the rank figure, such as the global dictionary or a random cluster's."""

    label: str
    accuracy: Share
    psnr: float
    """dB."""


def strength_figure(
    curves: Sequence[StrengthCurve], *, title: str, budget_label: str, svg: Path | None = None
) -> bytes:
    """Draw accuracy against the attack's budget, with bands of the 95 % intervals (paper, Fig. 4).

    Args:
        curves: the lines, in the order of the legend.
        title: above the figure.
        budget_label: norm and unit of the budget.
        svg: where to also save it.
    """
    figure, axes = _new_figure(1)
    for index, curve in enumerate(curves):
        ordered = sorted(curve.points, key=lambda point: point[0])
        budgets, shares = [budget for budget, _ in ordered], [share for _, share in ordered]
        style = _style(index)
        axes[0].plot(budgets, _percent(shares), label=_text(curve.label), **style)
        low, high = [100 * share.low for share in shares], [100 * share.high for share in shares]
        axes[0].fill_between(budgets, low, high, color=style["color"], alpha=0.15, linewidth=0)
    _label(axes[0], budget_label, "accuracy, %")
    axes[0].set_ylim(-3, 103)
    return _finish(figure, axes, title, svg)


def tradeoff_figure(lines: Sequence[TradeOff], *, title: str, svg: Path | None = None) -> bytes:
    """Draw attacked accuracy against clean accuracy, one line per defence over its strengths.

    A defence is better than another where its line is above: at equal clean accuracy.

    Args:
        lines: the defences, in the order of the legend.
        title: above the figure.
        svg: where to also save it.
    """
    figure, axes = _new_figure(1)
    for index, line in enumerate(lines):
        clean, attacked = [point[0] for point in line.points], [point[1] for point in line.points]
        axes[0].errorbar(
            _percent(clean),
            _percent(attacked),
            xerr=_error_bars(clean),
            yerr=_error_bars(attacked),
            label=_text(line.label),
            elinewidth=0.7,
            **_style(index),
        )
    _label(axes[0], "clean accuracy, %", "attacked accuracy, %")
    return _finish(figure, axes, title, svg)


def risk_coverage_figure(curves: Mapping[str, RiskCoverage], *, title: str, svg: Path | None = None) -> bytes:
    """Draw the error rate among the most confident images against their share.

    Args:
        curves: by label, which the legend shows with the AURC.
        title: above the figure.
        svg: where to also save it.
    """
    figure, axes = _new_figure(1)
    for index, (label, curve) in enumerate(curves.items()):
        style = {**_style(index), "marker": ""}
        name = f"{label} (AURC {curve.aurc:.3f})"
        axes[0].plot(100 * curve.coverage, 100 * curve.risk, label=_text(name), **style)
    _label(axes[0], "coverage, %", "errors among them, %")
    axes[0].set_xlim(0, 100)
    axes[0].set_ylim(bottom=0)
    return _finish(figure, axes, title, svg)


def rank_figure(
    accuracy: Sequence[Share],
    psnr: Sequence[float],
    references: Sequence[Reference],
    *,
    title: str,
    svg: Path | None = None,
) -> bytes:
    """Draw accuracy and PSNR by the rank of the cluster purified with (paper, Fig. 3).

    Args:
        accuracy: by Mahalanobis rank, the nearest cluster first.
        psnr: in dB, by rank.
        references: horizontal lines in both halves.
        title: above the figure.
        svg: where to also save it.

    Raises:
        ValueError: not one PSNR per accuracy.
    """
    if len(accuracy) != len(psnr) or not accuracy:
        raise ValueError(f"need one PSNR per accuracy, got {len(psnr)} and {len(accuracy)}")
    figure, axes = _new_figure(2)
    ranks = range(1, len(accuracy) + 1)
    style = _style(0)
    axes[0].errorbar(ranks, _percent(accuracy), yerr=_error_bars(accuracy), capsize=2, **style)
    axes[1].plot(ranks, psnr, **style)
    for index, reference in enumerate(references, start=1):
        line = {"color": _style(index)["color"], "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.3}
        axes[0].axhline(100 * reference.accuracy.value, label=_text(reference.label), **line)
        axes[1].axhline(reference.psnr, label=_text(reference.label), **line)
    for half, label in zip(axes, ("accuracy, %", "PSNR, dB"), strict=True):
        _label(half, "Mahalanobis rank of the cluster", label)
        half.locator_params(axis="x", integer=True)
    return _finish(figure, axes, title, svg)


def wcss_figure(classes: Mapping[str, Mapping[str, Any]], *, svg: Path | None = None) -> bytes:
    """Draw the WCSS of every class by k, with the chosen k as a large mark, beside that of Gaussian blobs.

    Args:
        classes: by name: `wcss` and `blob_wcss` for k = 1, 2, ..., and `elbow`, the chosen k.
        svg: where to also save it.
    """
    figure, axes = _new_figure(2)
    for index, (name, curve) in enumerate(classes.items()):
        style = _style(index)
        whole = curve["wcss"][0] or 1.0
        for half, values in zip(axes, (curve["wcss"], curve["blob_wcss"]), strict=True):
            shares = [100 * value / whole for value in values]
            half.plot(range(1, len(shares) + 1), shares, label=_text(name), **style)
            if half is axes[0]:
                chosen = curve["elbow"]
                half.plot([chosen], [shares[chosen - 1]], color=style["color"], marker="o", markersize=11)
    for half, label in zip(axes, ("WCSS, % of k = 1", "the same of one Gaussian blob, %"), strict=True):
        _label(half, "clusters k (large: chosen)", label)
        half.locator_params(axis="x", integer=True)
    axes[1].sharey(axes[0])
    return _finish(figure, axes, "WCSS of every class", svg)


def _new_figure(columns: int) -> "tuple[Figure, list[Axes]]":
    # Figures made without pyplot have the Agg canvas and no global state.
    figure = load_extra("matplotlib.figure").Figure(
        figsize=(6.4 if columns == 1 else 9.6, 4.2), layout="constrained"
    )
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _text(label: str) -> str:
    """Return a label that is shown as it is: no formula, and not hidden for a leading underscore."""
    escaped = label.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _percent(shares: Sequence[Share]) -> list[float]:
    return [100 * share.value for share in shares]


def _error_bars(shares: Sequence[Share]) -> list[list[float]]:
    """Return the distances to both ends of the interval, which rounding alone could make negative."""
    return [
        [100 * max(0.0, share.value - share.low) for share in shares],
        [100 * max(0.0, share.high - share.value) for share in shares],
    ]


def _label(axes: "Axes", x_label: str, y_label: str) -> None:
    axes.set_xlabel(_text(x_label))
    axes.set_ylabel(_text(y_label))
    axes.grid(visible=True, alpha=0.3)


def _finish(figure: "Figure", axes: "Sequence[Axes]", title: str, svg: Path | None) -> bytes:
    figure.suptitle(_text(title), fontsize="medium")
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend(fontsize="small")
    # The picture first: each rendering moves the layout a little, and the bytes must not depend on `svg`.
    png = _render(figure, "png", {"Software": None})
    if svg:
        # Fixed salt and no date: the same data is the same file.
        with load_extra("matplotlib").rc_context({"svg.hashsalt": "acsr-ray"}):
            atomic_write(svg, _render(figure, "svg", {"Date": None}))
    return png


def _render(figure: "Figure", kind: str, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
