"""The plots of benchmarks. The one file that imports matplotlib, when it draws."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from refengine.errors import InputError, MissingPackage
from verify.report.bench import Benchmark
from verify.report.caches import CacheStudy

FORMATS: Mapping[str, str] = {".png": "png", ".svg": "svg"}
COLOURS: Mapping[str, str] = {"without cache": "#b2182b", "with cache": "#2166ac"}
GREY, PALE = "#666666", "#e5e5e5"
SIZE, DOTS_PER_INCH = (7.5, 4.5), 160  # inches
CAPTION = 140  # characters a line
FAMILIES: Mapping[str, str] = {  # beginning of the names -> colour
    "ov-": "#b2182b",
    "ort-": "#762a83",
    "ggml-": "#1b7837",
    "hf-": "#b35806",
    "kivi-": "#b35806",
}
OURS = "#2166ac"
CACHE_SIZE = (9.0, 6.5)  # inches
LABEL = 6.5  # typographic points


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


def write_cache_plot(study: CacheStudy, path: Path, suffix: str) -> None:
    """Draws each scheme as a point with its name: divergence from the exact predictions against bytes a token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(CACHE_SIZE, DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    exact = study.schemes[0]
    points = [
        (
            figures.scheme,
            (figures.bytes_per_token / exact.bytes_per_token, figures.divergence),
            next((colour for start, colour in FAMILIES.items() if figures.scheme.startswith(start)), OURS),
        )
        for figures in study.schemes[1:]
    ]
    for _, place, colour in points:
        axes.plot(*place, "o", color=colour, markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [0.07, 0.1, 0.14, 0.2, 0.28, 0.5]
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("bytes of the cache, as a part of float32's")
    axes.set_ylabel("divergence of the predictions, nats a token")
    axes.grid(color=PALE)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title(f"{Path(study.model).name}: what a smaller cache costs", loc="left")
    caption = (
        f"{study.text_tokens} tokens of English text, decoded token by token; exact perplexity {exact.perplexity:.2f}"
    )
    figure.supxlabel(textwrap.fill(caption, CAPTION), x=0.01, horizontalalignment="left", fontsize=7, color=GREY)
    figure.canvas.draw()  # from here on it is known where on the page a point is
    pixels = axes.transData.transform([place for _, place, _ in points]) * 72 / DOTS_PER_INCH
    for (name, place, colour), offset in zip(
        points, _free_places([name for name, _, _ in points], pixels), strict=True
    ):
        axes.annotate(name, place, offset, textcoords="offset points", fontsize=LABEL, color=colour)
    figure.savefig(path, format=FORMATS[suffix])


def _free_places(names: Sequence[str], points: np.ndarray) -> Sequence[tuple[float, float]]:
    """Offsets of labels from their points, in typographic points, that cover no other point and no label before."""
    taken = [(x - 2, y - 2, x + 2, y + 2) for x, y in points]
    offsets = []
    for name, (x, y) in zip(names, points, strict=True):
        width = 0.56 * LABEL * len(name)
        around = [(dx, dy) for dy in (-2, 4, -8, 9, -14, 15, -20, 21) for dx in (4, -4 - width)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + LABEL) for dx, dy in around]
        own = (x - 2, y - 2, x + 2, y + 2)
        free = [not any(_overlap(box, other) for other in taken if other != own) for box in boxes]
        place = free.index(True) if True in free else 0
        taken.append(boxes[place])
        offsets.append(around[place])
    return offsets


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
