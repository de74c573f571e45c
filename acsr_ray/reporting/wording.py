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
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
