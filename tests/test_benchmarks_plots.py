"""Plots: what is drawn is where the numbers are, labelled, and readable."""

import re
from itertools import pairwise

import pytest

from linearize.benchmarks import plots
from linearize.benchmarks.heat import Grid, plot_heat
from linearize.benchmarks.plots import Line, Point, legible, plot_intervals, plot_lines, spread_labels
from tests.html_page import Page


def cells(svg: str) -> dict[tuple[float, float], float]:
    """Left upper corner -> opacity of every cell of a heat map."""
    return {
        (float(x), float(y)): float(opacity)
        for opacity, path in re.findall(r'fill-opacity: ([\d.]+)" d="([^"]+)"', svg)
        for x, y in re.findall(r"M([\d.]+) ([\d.]+)h[\d.]+v\d+h-", path)
        if "h16v10" not in path
    }


class TestHeat:
    def test_colours_are_stronger_where_values_are_higher(self):
        values = [[(row + 1) / (column + 1) for column in range(20)] for row in range(3)]
        svg = plot_heat("h", "losses", Grid(["0", "1", "2"], ["first", "last"], values, logarithmic=True))
        drawn = cells(svg)
        assert len(drawn) == 60
        ys = sorted({y for _, y in drawn})
        for y in ys:
            row = [drawn[key] for key in sorted(drawn) if key[1] == y]
            assert row == sorted(row, reverse=True)
        assert drawn[min(x for x, _ in drawn), ys[2]] == 1.0
        assert "values from 0.0500 to 3.00" in svg

    def test_wide_cells_say_their_number_and_empty_ones_nothing(self):
        svg = plot_heat("h", "t", Grid(["a", "b"], ["x", "y"], [[0.25, None], [1.0, 0.0]], low=0.0, high=1.0))
        assert len(cells(svg)) == 3
        page = Page(svg)
        assert {"0.250", "1.00", "0"} <= set(page.words)
        # Numbers on a strong colour are in the paper's.
        assert re.search(r'fill: var\(--paper\)">1.00<', svg)
        assert re.search(r'fill: var\(--ink\)">0.250<', svg)

    def test_ends_outside_the_scale_have_its_ends_shades(self):
        svg = plot_heat("h", "t", Grid(["a"], ["x", "y", "z"], [[-1.0, 0.5, 2.0]], low=0.0, high=1.0))
        assert list(dict(sorted(cells(svg).items())).values()) == [0.05, 0.58, 1.0]

    def test_labels_are_escaped_and_groups_stand_below(self):
        grid = Grid(["<b>"], ["10 %", "90 %"] * 2, [[0.0, 0.1, 0.2, 0.3]], groups=[("512", 2), ("1024", 2)])
        page = Page(plot_heat("h", "a & b", grid))
        assert {"<b>", "512", "1024", "a & b"} <= set(page.words)
        assert page.words.count("90 %") == 2

    def test_long_names_of_rows_are_cut(self):
        page = Page(plot_heat("h", "t", Grid(["a" * 60], ["x", "y"], [[0.0, 1.0]])))
        assert "a" * 21 + "…" in page.words

    @pytest.mark.parametrize("values", [[[1.0]], [[None, None]], [[2.0, 2.0]]])
    def test_one_value_or_none(self, values):
        svg = plot_heat("h", "t", Grid(["a"], ["x", "y"], values, logarithmic=values[0][0] is not None))
        assert "nan" not in svg


def test_labels_keep_apart_and_near_their_lines():
    heights = [0.05] * 5
    wanted = [0.5, 0.5, 0.52, 0.9, 0.1]
    places = spread_labels(wanted, heights, 0.0, 1.0)
    ordered = sorted(places)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(ordered))
    assert places[3] == pytest.approx(0.9)
    assert places[4] == pytest.approx(0.1)
    # Three that want the same place share it evenly.
    assert sum(places[:3]) / 3 == pytest.approx(sum(wanted[:3]) / 3)
    assert sorted(range(3), key=places.__getitem__) == [0, 1, 2]


def test_labels_stay_inside():
    places = spread_labels([1.0, 1.0, 0.0, 0.0], [0.1] * 4, 0.0, 1.0)
    assert sorted(places) == pytest.approx([0.05, 0.15, 0.85, 0.95])


def test_ticks_that_would_touch_are_left_out():
    assert legible([256, 257], 16, 257) == [257]
    assert legible([1024, 4096, 8192], 1024, 8192) == [1024, 4096, 8192]
    dense = legible([2**n for n in range(4, 13)], 16, 4096)
    assert dense[-1] == 4096
    assert 3 <= len(dense) < 9


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib")
class TestLines:
    def test_every_line_has_its_name_beside_it_and_its_ends_in_the_description(self):
        lines = [
            Line("original", [1024, 4096], [20.0, 40.0], [19.0, 39.0], [21.0, 41.0]),
            Line("student", [1024, 4096], [30.0, 30.0]),
            Line("a <b> & $x$ row", [1024], [25.0]),
        ]
        svg = plot_lines("n", "Time", lines, "context in tokens", "ms")
        page = Page(svg)
        words = " ".join(page.words)
        assert "student" in words
        assert "a <b> & $x$ row: 25.0 at 1024." in words
        assert "original: 20.0 at 1024, 40.0 at 4096." in words
        assert "b" not in page.tags
        assert "#0101" not in svg
        assert "DejaVu" not in svg
        assert len(page.ids) == len(set(page.ids))
        assert all(name.startswith("n-") for name in page.ids)

    def test_an_axis_has_no_place_for_zero(self):
        with pytest.raises(ValueError, match="n: student has a number that is not above 0"):
            plot_lines("n", "t", [Line("student", [1, 2], [0.0, 1.0])], "x", "y")

    def test_intervals(self):
        points = [Point("student", 0.3, (0.2, 0.4)), Point("control", -0.1, None, "control, one sequence")]
        page = Page(plot_intervals("n", "Differences", points, "nats", 0))
        assert "student: 0.300 (0.200 to 0.400). control, one sequence: −0.100." in " ".join(page.words)
        assert plot_intervals("n", "Differences", points, "nats", 0) == plot_intervals(
            "n", "Differences", points, "nats", 0
        )
