"""The page of a run: one HTML file that loads nothing and runs nothing."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from acsr_ray.columns import QUARANTINED
from acsr_ray.evaluation.markup import Markup, element, joined, page, visible
from acsr_ray.evaluation.report import table_markup, warning_box
from acsr_ray.evaluation.tables import Table
from acsr_ray.reporting import gallery, plots
from acsr_ray.reporting.contents import Contents
from acsr_ray.reporting.notices import notices
from acsr_ray.reporting.record import RunRecord
from acsr_ray.reporting.sampling import LISTED_ROWS
from acsr_ray.reporting.wording import counted, duration, number, percent

MOST_LISTED = 100
"""Rows of a list on the page; the JSON beside it has all."""
LONGEST = 300
"""Characters of a message on the page."""

BADGES = {
    "done": ("\N{CHECK MARK} done", "badge good"),
    "stopped": ("\N{BLACK SQUARE} stopped, can go on", "badge bad"),
    "failed": ("\N{BALLOT X} failed", "badge bad"),
    "running": ("\N{BLACK RIGHT-POINTING TRIANGLE} running", "badge"),
}
REASONS = {
    "decode_error": "the file is damaged",
    "empty": "no bytes",
    "null_image": "no image in the row",
    "too_large": "beyond the limits on size",
    "unsupported_format": "no image, or of a kind that is not accepted",
    "decoder_crash": "the decoder crashed on it",
    "decoder_timeout": "the decoder took too long",
    "decoder_memory": "the decoder needed too much memory",
    "out_of_memory": "purifying it alone took too much memory; `acsr-ray retry` where there is more",
    "stage_error": "purifying it alone raised an error; see the log of the run, then `acsr-ray retry`",
    "worker_crash": "workers died of it, every time; look at it apart from the rest, then `acsr-ray retry`",
    "solver_fallback": "the solver failed on it; see the setting on_failure",
}


def run_page(contents: Contents) -> str:
    """Return the page; whatever comes from data is escaped."""
    record = contents.record
    title = f"Purification run {record.run}"
    return page(
        title,
        element("header", element("h1", title), _badge(record), _facts(contents), _settings(record.settings)),
        warning_box([(name, _short(text)) for name, text in notices(record)]),
        element(
            "main",
            _tiles(contents),
            _section("Outcome of the images", "", _outcomes(record)),
            _section("Time", plots.TIME, plots.over_time(record)),
            _section("Planned and actual", "", plots.planned(record)) if record.plan else Markup(),
            _section("Before and after", _sampled(contents), _examples(contents)),
            _section("Change and distance", plots.MEASURES, plots.measures(contents)),
            _section("Clusters", "", plots.clusters(contents), _montage(contents)),
            _section("Quarantine", "", _quarantine(contents)),
            _section("Not done", "", _not_done(record)),
            _section("No longer there", "", _removed(record)),
        ),
        element("footer", element("p", _about(record), class_="note")),
    )


def _section(heading: str, words: str, *parts: Markup) -> Markup:
    there = [part for part in parts if part]
    if not there:
        return Markup()
    lead = (element("p", words, class_="note"),) if words else ()
    return element("section", element("h2", heading), *lead, *there)


def _badge(record: RunRecord) -> Markup:
    words, kind = BADGES.get(record.outcome, (record.outcome, "badge"))
    return element("p", element("span", words, class_=kind))


def _facts(contents: Contents) -> Markup:
    record = contents.record
    facts = [
        ("input", record.input),
        ("output", record.output),
        ("bundle", contents.names.bundle or record.bundle),
        ("started", re.sub("(Z|\\+00:00)$", " UTC", record.started_at.replace("T", " "))),
        ("took", duration(record.elapsed_s) if record.elapsed_s is not None else ""),
    ]
    shown = (
        joined(element("dt", name), element("dd", element("code", _short(text)) if name in _CODE else text))
        for name, text in facts
        if text
    )
    return element("dl", *shown, class_="facts")


_CODE = {"input", "output", "bundle"}


def _settings(settings: Mapping[str, Any]) -> Markup:
    rows = tuple((_short(name), _short(text)) for name, text in sorted(_flat(settings)))
    if not rows:
        return Markup()
    table = table_markup(Table("", "", ("setting", "value"), rows), "words")
    return element("details", element("summary", f"Settings ({len(rows)})"), table)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", "" if value is None else str(value)))
    return found


def _tiles(contents: Contents) -> Markup:
    record = contents.record
    refused, done = record.statuses.get(QUARANTINED, 0), sum(record.statuses.values())
    tiles = []
    if record.images is not None:
        tiles.append((number(record.images), "images in this run"))
    if record.images and record.elapsed_s:
        tiles.append((number(record.images / record.elapsed_s), "images per second"))
    if done:
        tiles.append((f"{refused:,}", f"in quarantine, {percent(refused, done)}"))
    if contents.residual.bins.total:
        words = "median residual" if record.residual.total else "median residual of the sample"
        tiles.append((number(contents.residual.bins.quantile(0.5)), words))
    if contents.names.clusters:
        used = sum(use.images > 0 for use in contents.usage)
        tiles.append((f"{used} of {len(contents.usage)}", "clusters in use"))
    if record.units is not None:
        tiles.append((number(record.units), "units"))
    if record.retries is not None:
        tiles.append((number(record.retries), "units tried again"))
    if record.batch_fill is not None:
        tiles.append((percent(record.batch_fill, 1.0), "of the batches of encoder and solver filled"))
    if record.corpus is not None:
        tiles.append((number(record.corpus.images), "images in the output"))
    shown = (element("li", element("b", figure), element("span", words)) for figure, words in tiles)
    return element("ul", *shown, class_="tiles")


def _outcomes(record: RunRecord) -> Markup:
    corpus = record.corpus
    whole = corpus.statuses if corpus else {}
    reasons = corpus.quarantined if corpus else {}
    parts = []
    if record.statuses or whole:
        parts.append(_counts("status", record.statuses, whole, {}))
    if record.reasons or reasons:
        parts.append(_counts("reason", record.reasons, reasons, REASONS))
    return joined(*parts)


def _counts(
    what: str, run: Mapping[str, int], whole: Mapping[str, int], meaning: Mapping[str, str]
) -> Markup:
    """Return counts of the run, where it told them, beside those of the whole output where they differ."""
    names = sorted({*run, *whole}, key=lambda name: (-run.get(name, 0), -whole.get(name, 0), name))
    both = [("images", run)] if run == whole else [("this run", run), ("whole output", whole)]
    columns = [(head, counts, sum(counts.values())) for head, counts in both if counts]
    rows = []
    for name in names:
        cells = [
            cell
            for _, counts, total in columns
            for cell in (f"{counts.get(name, 0):,}", percent(counts.get(name, 0), total))
        ]
        rows.append((_short(name), *cells, *([meaning.get(name, "")] if meaning else [])))
    header = [what, *(cell for head, *_ in columns for cell in (head, "share"))]
    if meaning:
        header.append("meaning")
    table = Table(f"By {what}", "", tuple(header), tuple(rows))
    return table_markup(table, "counts meant" if meaning else "counts")


def _sampled(contents: Contents) -> str:
    return (
        f"Chosen by numbers, not by looks, from {contents.sample}. Pixels are as stored, magnified without "
        "smoothing. Difference: grey where nothing changed, the change magnified by the factor shown. "
        "Distance: Mahalanobis distance to the cluster that was chosen. Residual: relative l2 change of the "
        "image."
    )


def _examples(contents: Contents) -> Markup:
    if not contents.examples:
        return element("p", "There is no purified image that could be shown.")
    return gallery.examples(contents.examples, contents.names)


def _montage(contents: Contents) -> Markup:
    if not contents.montage:
        return Markup()
    usage = {use.label: use.images for use in contents.usage}
    words = "Purified images of the most used clusters, as they come in the files that were looked into."
    return joined(
        element("h3", "What the clusters hold"),
        element("p", words, class_="note"),
        gallery.montage(contents.montage, usage),
    )


def _quarantine(contents: Contents) -> Markup:
    total = sum((contents.record.corpus.quarantined if contents.record.corpus else {}).values())
    if not total:
        return element("p", "No image of the output is in quarantine.")
    source = contents.record.input
    rows = tuple(
        (_short(row.reason), _short(row.path or ""), _short(_within(source, row.shard)), f"{row.number:,}")
        for row in contents.refused[:MOST_LISTED]
    )
    more = f" All of the first {LISTED_ROWS} are in report.json." if len(contents.refused) > len(rows) else ""
    caption = (
        f"{counted(len(rows), 'image')} of {total:,} in the whole output; their bytes are not shown.{more}"
    )
    table = Table("Refused images", caption, ("reason", "image", "shard", "row"), rows)
    return table_markup(table, "words")


def _not_done(record: RunRecord) -> Markup:
    shards = {_within(record.input, uri): why for uri, why in record.refused_shards.items()}
    lists = (
        ("Refused shards", "shard", shards, record.num_refused),
        ("Failed units", "unit", record.failed_units, record.num_failed),
    )
    return joined(*(_list(title, what, found, total) for title, what, found, total in lists if found))


def _removed(record: RunRecord) -> Markup:
    names = {name: "left the input" for name in record.removed_shards}
    return _list("Removed shards", "shard", names, record.num_removed) if names else Markup()


def _list(title: str, what: str, found: Mapping[str, str], total: int) -> Markup:
    rows: Sequence[tuple[str, ...]] = [(_short(name), _short(why)) for name, why in found.items()]
    shown, caption = tuple(rows[:MOST_LISTED]), ""
    if total > len(shown):
        caption = f"The first {len(shown)} of {total:,}; report.json has the first {len(rows):,}."
    return table_markup(Table(title, caption, (what, "why"), shown), "words")


def _within(source: str, uri: str) -> str:
    """Return a shard's path in the corpus, all of its URI where it is not of it."""
    bare, root = uri.removeprefix("file://"), source.removeprefix("file://").rstrip("/")
    return bare.removeprefix(f"{root}/") if root else bare


def _about(record: RunRecord) -> str:
    origin = f"{record.output}/{record.origin}" if record.origin else f"the snapshot of {record.output}"
    return f"Written by acsr-ray from {origin}. The same figures are in report.json beside this file."


def _short(text: str) -> str:
    return visible(text, LONGEST)
