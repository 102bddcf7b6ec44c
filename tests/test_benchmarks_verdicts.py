"""Verdicts decide where an interval leaves out "no difference", and say nothing elsewhere."""

import pytest

from linearize.benchmarks.verdicts import difference_interval, of_counts, of_interval, of_ranges, tone


@pytest.mark.parametrize(
    ("ci95", "neutral", "better", "verdict"),
    [
        ((0.1, 0.2), 0, "lower", "bad"),
        ((-0.2, -0.1), 0, "lower", "good"),
        ((-0.1, 0.1), 0, "lower", "open"),
        ((0.0, 0.1), 0, "lower", "open"),
        ((1.1, 1.2), 1, "higher", "good"),
        ((0.8, 0.9), 1, "higher", "bad"),
        (None, 0, "lower", "open"),
    ],
)
def test_intervals(ci95, neutral, better, verdict):
    assert of_interval(ci95, neutral, better) == verdict


def test_ranges_of_times():
    assert of_ranges((1, 2), (3, 4), 4) == "good"
    assert of_ranges((3, 4), (1, 2), 4) == "bad"
    assert of_ranges((1, 3), (3, 4), 4) == "open"
    assert of_ranges((1, 2), (3, 4), 3) == "open"


@pytest.mark.parametrize(
    ("counts", "interval"),
    [((56, 70, 48, 80), (0.0524, 0.3339)), ((9, 10, 3, 10), (0.1705, 0.8090)), ((10, 10, 0, 20), (0.6791, 1.0))],
)
def test_the_interval_is_that_of_the_paper(counts, interval):
    """Newcombe 1998, table II, method 10."""
    assert difference_interval(*counts) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "trials", "verdict"),
    [
        (0, 3, 3, "bad"),
        (1, 4, 4, "bad"),
        (3, 4, 4, "open"),
        (4, 4, 4, "open"),
        (9, 4, 9, "good"),
        (0, 0, 9, "open"),
        (0, 0, 0, "open"),
        (0, 1, 1, "open"),
    ],
)
def test_counts(ours, theirs, trials, verdict):
    assert of_counts(ours, theirs, trials) == verdict
    assert of_counts(theirs, ours, trials) == {"good": "bad", "bad": "good", "open": "open"}[verdict]


def test_only_what_is_decided_has_a_tone():
    assert [tone(verdict) for verdict in ("good", "bad", "open")] == ["good", "bad", ""]
