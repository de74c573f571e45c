"""Numbers as people read them."""

import math


def number(value: float | None) -> str:
    """Return a count or a measure with three significant digits, or a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def percent(part: float, whole: float) -> str:
    """Return a share in percent; what is not zero is not shown as zero, what is not all not as all."""
    if whole <= 0:
        return number(None)
    share = 100 * part / whole
    if 0 < share < 0.01:
        return "< 0.01 %"
    if 99.99 < share < 100:
        return "> 99.99 %"
    return f"{share:.2f} %" if share < 1 or 99 < share < 100 else f"{share:.1f} %"


def duration(seconds: float | None) -> str:
    """Return seconds in the two largest units that matter."""
    if seconds is None or not math.isfinite(seconds):
        return number(None)
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    sizes = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    largest = next(place for place, (_, size) in enumerate(sizes) if whole >= size)
    parts = [(whole // size, unit) for unit, size in sizes[largest : largest + 1]]
    unit, size = sizes[largest + 1]
    rest = whole % sizes[largest][1] // size
    return " ".join(f"{count} {name}" for count, name in [*parts, (rest, unit)] if count)


def clock(seconds: float) -> str:
    """Return a time as short as a mark of an axis has to be, such as 40 s, 1:20 min or 2:05 h."""
    if seconds < 60:
        return f"{seconds:g} s"
    whole, unit = (seconds, "min") if seconds < 3600 else (seconds / 60, "h")
    return f"{whole // 60:.0f}:{whole % 60:02.0f} {unit}"


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
