"""Better, worse or undecided: how a student's number compares with the original's.

A verdict is `"good"`, `"bad"` or `"open"`; `"open"` says that no difference was measured, never that there is none.
"""

import math
from collections.abc import Sequence

__all__ = ["difference_interval", "of_counts", "of_interval", "of_ranges", "tone"]

Z = 1.959963985  # the normal quantile of a 95 % interval
ENOUGH = 4


def of_interval(ci95: Sequence[float] | None, neutral: float, better: str) -> str:
    """The verdict of a 95 % interval: decided where it leaves out `neutral`, the value of "no difference".

    Args:
        ci95: `[low, high]`; None where there is none.
        neutral: 0 for a difference, 1 for a ratio.
        better: which side is the better one, `"higher"` or `"lower"`.
    """
    if ci95 is None:
        return "open"
    low, high = ci95
    if low <= neutral <= high:
        return "open"
    return "good" if (low > neutral) == (better == "higher") else "bad"


def of_ranges(ours: Sequence[float], theirs: Sequence[float], repeats: int) -> str:
    """The verdict of two ranges `[low, high]` where lower is better: decided where they do not overlap, and each is of
    `ENOUGH` repeats: those of fewer lie apart by chance in more than 5 % of cases (of three in 10 %)."""
    if repeats < ENOUGH:
        return "open"
    if ours[1] < theirs[0]:
        return "good"
    return "bad" if ours[0] > theirs[1] else "open"


def of_counts(ours: int, theirs: int, trials: int) -> str:
    """The verdict of two counts of the same number of trials, where higher is better. See `difference_interval`."""
    return of_interval(difference_interval(ours, trials, theirs, trials), 0, "higher") if trials else "open"


def difference_interval(hits: int, trials: int, other_hits: int, other_trials: int) -> tuple[float, float]:
    """The 95 % interval of hits / trials - other_hits / other_trials.

    Trials are taken as independent: what is known of pairs could only make it narrower.

    Source: Newcombe 1998, Interval estimation for the difference between independent proportions, method 10:
    each share's Wilson interval, and the distances of its ends from the share added in squares.
    """
    share, other = hits / trials, other_hits / other_trials
    (low, high), (other_low, other_high) = _wilson(share, trials), _wilson(other, other_trials)
    down = share - other - math.hypot(share - low, other_high - other)
    return down, share - other + math.hypot(high - share, other - other_low)


def _wilson(share: float, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share."""
    middle = share + Z**2 / (2 * trials)
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return (middle - half) / scale, (middle + half) / scale


def tone(verdict: str) -> str:
    """A verdict as the tone of a table's cell, which stays plain where nothing was decided."""
    return verdict if verdict in ("good", "bad") else ""
