"""The console table of the ways to store a cache. Plain text when not on a terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.report.caches import CacheFigures, CacheStudy

WORDS: Mapping[str, str] = {
    "B/token": "of keys and values of all layers, scales included, measured on a real cache; then as a part of float32",
    "tokens/s": "decoded by the reference engine, one row, with so many tokens in the cache; schemes take turns",
    "perplexity": "change from float32's, the text decoded token by token: a runtime that rounds its cache for later "
    "passes alone would show nothing in one pass",
    "KL": "Kullback-Leibler divergence from float32's predictions, nats a token",
    "same": "share of positions whose likeliest token is float32's",
}


def print_caches(study: CacheStudy, console: Console) -> None:
    """Prints where the figures come from, the table, and what its columns mean."""
    exact = study.schemes[0]
    facts = {
        "machine": study.machine,
        "model": f"{study.model}, perplexity {exact.perplexity:.3f} with a float32 cache",
        "text": f"{study.text_tokens} tokens of Python's own help, in rows of {study.row_tokens}",
    }
    console.print(_headed(facts))
    console.print()
    console.print(_table(study))
    if study.left_out:
        console.print(f"\n[bold]left out[/], since this model's heads do not fit: {', '.join(study.left_out)}")
    console.print()
    console.print(_headed(WORDS))


def _headed(texts: Mapping[str, str]) -> Table:
    """Texts beside their headings."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for heading, text in texts.items():
        table.add_row(f"[bold]{heading}[/]", escape(text))
    return table


def _table(study: CacheStudy) -> Table:
    exact = study.schemes[0]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("scheme", no_wrap=True, vertical="bottom")
    speeds = [f"tok/s\nat {position}" for position in exact.tokens_per_second]
    for heading in ("B/token", "of\nf32", *speeds, "perplex-\nity", "KL", "same"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for figures in study.schemes:
        table.add_row(*_cells(figures, exact))
    return table


def _cells(figures: CacheFigures, exact: CacheFigures) -> list[str]:
    return [
        figures.scheme,
        f"{figures.bytes_per_token:.0f}",
        f"{figures.bytes_per_token / exact.bytes_per_token:.3f}",
        *(f"{rate:.3g}" for rate in figures.tokens_per_second.values()),
        f"{figures.perplexity / exact.perplexity - 1:+.2%}",
        f"{figures.divergence:.1e}",
        f"{figures.same_choice:.1%}",
    ]
