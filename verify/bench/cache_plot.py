"""The plot of a study of caches: quality against bytes. Imports matplotlib when it draws."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

from verify.bench.plot import CAPTION, FORMATS, GREY, PALE
from verify.report.caches import CacheStudy

FAMILIES: Mapping[str, str] = {  # beginning of the names -> colour
    "ov-": "#b2182b",
    "ort-": "#762a83",
    "ggml-": "#1b7837",
    "hf-": "#b35806",
    "kivi-": "#b35806",
}
OURS = "#2166ac"
SIZE, DOTS_PER_INCH = (9.0, 6.5), 160


def write_cache_plot(study: CacheStudy, path: Path, suffix: str) -> None:
    """Draws each scheme as a point with its name: divergence from the exact predictions against bytes a token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(SIZE, DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    exact = study.schemes[0]
    for figures in study.schemes[1:]:
        colour = next((colour for start, colour in FAMILIES.items() if figures.scheme.startswith(start)), OURS)
        share = figures.bytes_per_token / exact.bytes_per_token
        axes.plot(share, figures.divergence, "o", color=colour, markersize=4)
        axes.annotate(
            figures.scheme, (share, figures.divergence), (4, 2), textcoords="offset points", fontsize=6.5, color=colour
        )
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
    figure.savefig(path, format=FORMATS[suffix])
