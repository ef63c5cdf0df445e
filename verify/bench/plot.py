"""The plot of a benchmark: time per token against its position. The one file that imports matplotlib, when it draws."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

from refengine.errors import InputError, MissingPackage
from verify.report.bench import Benchmark

FORMATS: Mapping[str, str] = {".png": "png", ".svg": "svg"}
COLOURS: Mapping[str, str] = {"without cache": "#b2182b", "with cache": "#2166ac"}
GREY, PALE = "#666666", "#e5e5e5"
SIZE, DOTS_PER_INCH = (7.5, 4.5), 160  # inches
CAPTION = 140  # characters a line


def check_plot(path: Path) -> None:
    """Raises InputError when a file of this name cannot be drawn: it is no PNG or SVG, or matplotlib is missing."""
    if path.suffix not in FORMATS:
        raise InputError(f"--plot: expected a file name that ends in {' or '.join(FORMATS)}, found {path.name!r}")
    try:
        import matplotlib.figure  # noqa: F401 -- an extra: whether it is there, before minutes of measuring
    except ImportError as error:
        raise MissingPackage(
            f'--plot: drawing needs matplotlib, which cannot be imported ({error}): pip install "tokenproof[plot]"'
        ) from error


def write_plot(benchmark: Benchmark, path: Path, suffix: str) -> None:
    """Draws the benchmark's curves, each named at its end, into a file of the kind that `suffix` names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(SIZE, DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in benchmark.curves:
        milliseconds = [1e3 * seconds for seconds in curve.seconds]
        axes.plot(curve.positions, milliseconds, color=COLOURS[curve.name], linewidth=2, clip_on=False)
        axes.annotate(
            f"{curve.name}\n{milliseconds[-1]:.3g} ms",
            (curve.positions[-1], milliseconds[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=COLOURS[curve.name],
            verticalalignment="center",
        )
    axes.set_xlim(0, max(curve.positions[-1] for curve in benchmark.curves))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the sequence, tokens")
    axes.set_ylabel("time for one token, ms")
    axes.grid(axis="y", color=PALE)
    axes.tick_params(which="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{Path(benchmark.model).name}: one more token, with and without the cache", loc="left")
    caption = f"reference engine, float32, one row; {benchmark.machine.text}"
    figure.supxlabel(textwrap.fill(caption, CAPTION), x=0.01, horizontalalignment="left", fontsize=7, color=GREY)
    figure.savefig(path, format=FORMATS[suffix])
