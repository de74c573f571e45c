"""The report of a doubt model: what it routes to people, what errors are left, whether it is calibrated."""

from acsr_ray.config import MissingExtraError
from acsr_ray.evaluation.doubt_scores import COVERAGES, DoubtScores, Threshold, risk_at
from acsr_ray.evaluation.figures import risk_coverage_figure
from acsr_ray.evaluation.report import Picture, Section, html_report
from acsr_ray.evaluation.tables import Table
from acsr_ray.purification.doubt import Logistic

WHOLE = "nothing"
"""Cell for what there is none of."""


def doubt_report(title: str, about: str, scores: DoubtScores, logistic: Logistic) -> str:
    """Return the page.

    Args:
        title: of the page.
        about: bundle, classifier, data and attacks, in words.
        scores: on held-out images.
        logistic: the fitted function.
    """
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    try:
        png = risk_coverage_figure(scores.curves, title="Errors left among the images that are answered")
        pictures = (Picture("Coverage is the share of the traffic that does not go to people.", png),)
    except MissingExtraError as error:
        notes = (f"Without a figure: {error}",)
    sections = (
        Section(paragraphs=(about, _traffic(scores), *notes)),
        Section("Errors left", tables=(coverage_table(scores),), figures=pictures),
        Section("What a threshold routes to people", tables=(threshold_table(scores),)),
        Section("Ranking", paragraphs=(_gain(scores),), tables=(auroc_table(scores),)),
        Section("Calibration", tables=(reliability_table(scores), kind_table(scores))),
        Section("The model", tables=(model_table(logistic),)),
    )
    return html_report(title, sections)


def coverage_table(scores: DoubtScores) -> Table:
    """Return the error rate that is left at some coverages, by score."""
    rows = tuple(
        (
            f"{100 * coverage:g} %",
            *(str(risk_at(curve, coverage, scores.images)) for curve in scores.curves.values()),
        )
        for coverage in COVERAGES
    )
    caption = (
        f"Error rate among the answered images in percent [95 %], {scores.images} held-out images. "
        "Confidence: that of the classifier on the purified image."
    )
    return Table("Errors left by coverage", caption, ("coverage", *scores.curves), rows)


def threshold_table(scores: DoubtScores) -> Table:
    """Return what every threshold sends to people."""
    header = (
        "doubt above",
        "to people",
        "of clean images",
        "of attacked images",
        "of the errors",
        "errors among the rest",
    )
    caption = (
        "Set on the images that doubt was fitted on, to route 0, 1, 5, 10 and 20 %; measured on the others. "
        "Percent [95 %]."
    )
    return Table("Thresholds", caption, header, tuple(map(_threshold_row, scores.thresholds)))


def auroc_table(scores: DoubtScores) -> Table:
    """Return the areas under the ROC curves, by score."""
    rows = tuple(
        (name, f"{scores.auroc_wrong[name]:.3f}", f"{scores.auroc_attacked[name]:.3f}", f"{curve.aurc:.4f}")
        for name, curve in scores.curves.items()
    )
    caption = "Areas: under the ROC curve, 0.5 is chance; under the risk-coverage curve, less is better."
    return Table("Ranking", caption, ("score", "AUROC, wrong", "AUROC, attacked", "AURC"), rows)


def reliability_table(scores: DoubtScores) -> Table:
    """Return what doubt says and what comes true, in bins of equal weight."""
    rows = tuple(
        (f"{100 * entry.share:.0f} %", f"{100 * entry.probability:.1f}", f"{100 * entry.frequency:.1f}")
        for entry in scores.bins
    )
    caption = (
        f"Percent. Expected calibration error {100 * scores.calibration_error:.2f} points, Brier score "
        f"{scores.brier:.4f}."
    )
    return Table("Doubt and errors", caption, ("images", "mean doubt", "errors"), rows)


def kind_table(scores: DoubtScores) -> Table:
    """Return error rates and mean doubt of clean images and of each attack."""
    rows = tuple(
        (kind.name, str(kind.bare), str(kind.purified), f"{100 * kind.doubt:.1f}") for kind in scores.kinds
    )
    caption = (
        "Percent [95 %]. Doubt is calibrated for the whole traffic; where its mean is far from the errors of "
        "one kind, it does not tell this kind."
    )
    header = ("images", "errors, not purified", "errors, purified", "mean doubt")
    return Table("By kind of image", caption, header, rows)


def model_table(logistic: Logistic) -> Table:
    """Return the coefficients."""
    rows = tuple(
        (name, f"{coefficient:+.3f}", f"{mean:.4g}", f"{scale:.4g}")
        for name, coefficient, mean, scale in zip(
            logistic.features, logistic.coefficients, logistic.mean, logistic.scale, strict=True
        )
    )
    caption = f"Log odds per standard deviation of the feature; intercept {logistic.intercept:+.3f}."
    return Table("Coefficients", caption, ("feature", "coefficient", "mean", "standard deviation"), rows)


def _threshold_row(threshold: Threshold) -> tuple[str, ...]:
    return (
        f"{threshold.value:.4f}",
        str(threshold.routed),
        str(threshold.routed_clean),
        str(threshold.routed_attacked),
        str(threshold.caught),
        WHOLE if threshold.left is None else str(threshold.left),
    )


def _traffic(scores: DoubtScores) -> str:
    return (
        f"Everything is about traffic of which {100 * scores.prevalence:g} % is attacked, by every attack "
        "equally often. Where more or other attacks come, more errors are left at the same threshold."
    )


def _gain(scores: DoubtScores) -> str:
    gain = scores.gain
    return (
        f"AURC of confidence alone minus that of doubt: {gain.value:+.4f} "
        f"[{gain.low:+.4f}, {gain.high:+.4f}] (95 %, by resampling images). Above 0 doubt is better."
    )
