"""Numbers as the report's tables say them."""

from collections.abc import Callable, Sequence

from linearize.benchmarks.summary import number

__all__ = ["DASH", "counted", "ends", "share", "signed", "span"]

DASH = "–"  # not measured, or it cannot be computed


def span(interval: Sequence[float] | None, form: Callable[[float], str] = number) -> str:
    """`[low, high]` as "low to high"; a dash for None."""
    return DASH if interval is None else f"{form(interval[0])} to {form(interval[1])}"


def signed(value: float | None) -> str:
    """A difference, with its sign also where it is positive."""
    return DASH if value is None else f"{'+' if value > 0 else ''}{number(value)}"


def counted(count: int, noun: str) -> str:
    """ "1 sequence", "2 sequences"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def share(value: float) -> str:
    """A share of 1 with two decimals, for the cells of a heat map."""
    return f"{value:.2f}"


def ends(interval: Sequence[float] | None) -> list[float | None]:
    """The two ends of an interval as columns of a file."""
    return [None, None] if interval is None else [interval[0], interval[1]]
