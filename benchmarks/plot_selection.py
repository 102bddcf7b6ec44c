"""A picture of a ranking: one bar a layer, the kept ones filled."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from linearize.benchmarks.plots import available
from linearize.errors import LinearizeError

__all__ = ["check_plot", "plot_selection"]

INK, KEPT, GRID = "#222222", "#1f6feb", "#dddddd"


def check_plot() -> None:
    """Before the work whose picture is asked for.

    Raises:
        LinearizeError: matplotlib is not installed.
    """
    if not available():
        raise LinearizeError("out: a .png needs matplotlib, which is not installed; install it, or give a .json")


def plot_selection(path: Path, by: str, scores: Mapping[int, float], kept: Sequence[int]) -> None:
    """Write a PNG: a bar for each layer, filled where the layer stays softmax and an outline where it does not.

    Args:
        path: of the PNG.
        by: the score's name, for the axis.
        scores: by layer, at least one.
        kept: layers among them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "font.size": 10,
        "axes.edgecolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "legend.frameon": False,
    }
    # rc_context, and a figure without pyplot: a user's own settings and backend stay what they are.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context({**defaults, **settings}):
        figure = Figure(figsize=(max(4.6, 0.2 * len(scores) + 1.4), 3.1), layout="constrained")
        axes = figure.add_subplot()
        for label, layers, face in (
            ("stays softmax", [i for i in scores if i in kept], KEPT),
            ("converted", [i for i in scores if i not in kept], "none"),
        ):
            axes.bar(layers, [scores[i] for i in layers], label=label, color=face, edgecolor=KEPT, linewidth=1.0)
        axes.set_xticks(list(scores)[:: max(1, len(scores) // 10)])
        axes.set_xlabel("layer")
        axes.set_ylabel(by)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2)
        figure.savefig(path, format="png", dpi=160)
