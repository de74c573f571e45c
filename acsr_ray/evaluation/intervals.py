"""Confidence intervals of shares."""

from dataclasses import dataclass

import numpy as np

Z_95 = 1.959964


@dataclass(frozen=True)
class Share:
    """A share of `count` trials with its Wilson 95 % interval."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """Return it in percent, such as `91.2 [88.1, 93.6]`."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson_share(successes: int, count: int) -> Share:
    """Return the share of successes with its 95 % score interval (Wilson 1927).

    Raises:
        ValueError: unless 0 <= successes <= count and count >= 1.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"need 0 <= successes <= count >= 1, got {successes} of {count}")
    return score_share(successes / count, count)


def score_share(value: float, count: int) -> Share:
    """Return a share with the 95 % score interval that it would have as the share of so many trials.

    For means of values in [0, 1], one per trial, that are not all 0 or 1: their variance is at most that of
    0s and 1s with the same mean, so the interval is wide enough.

    Raises:
        ValueError: unless 0 <= value <= 1 and count >= 1.
    """
    if count < 1 or not 0 <= value <= 1:
        raise ValueError(f"need 0 <= value <= 1 and count >= 1, got {value} of {count}")
    z2 = Z_95**2
    centre = (value + z2 / (2 * count)) / (1 + z2 / count)
    spread = Z_95 / (1 + z2 / count) * np.sqrt(value * (1 - value) / count + z2 / (4 * count**2))
    return Share(value, max(0.0, centre - float(spread)), min(1.0, centre + float(spread)), count)
