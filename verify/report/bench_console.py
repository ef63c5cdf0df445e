"""The console table of a benchmark. Plain text when not on a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.report.bench import Benchmark, Figures, Row

COLUMNS = ("tokens\n/ s", "times\nrow 1", "first\nms", "next\nms", "95 %\nms", "peak\nMB", "roof\nline")
WORDS: Mapping[str, str] = {
    "continuous": "requests of different lengths, each of which joins and leaves the batch by itself",
    "times row 1": "tokens a second in those of the first row, the two taking turns",
    "first, next": "from the start to a request's first token, and between its further ones: medians, and the 95th "
    "percentile of the latter",
    "peak": "memory of the row's own process",
    "roofline": "the least time that this machine's rates allow, as a part of the time taken",
}


def print_benchmark(benchmark: Benchmark, console: Console) -> None:
    """Prints where the figures come from, the table, what kept rows from being measured, and what the columns mean."""
    console.print(_headed(_facts(benchmark)))
    console.print()
    console.print(_table(benchmark.rows))
    for line in _reasons(benchmark.rows):
        console.print(escape(line), soft_wrap=True)
    console.print()
    console.print(_headed(WORDS))


def _headed(texts: Mapping[str, str]) -> Table:
    """Texts beside their headings."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for heading, text in texts.items():
        table.add_row(f"[bold]{heading}[/]", escape(text))
    return table


def _facts(benchmark: Benchmark) -> dict[str, str]:
    rates = f"{benchmark.machine.bandwidth / 1e9:.3g} GB/s, {benchmark.machine.flops / 1e9:.3g} GFLOP/s with NumPy"
    return {
        "machine": f"{benchmark.machine.text}; {rates}",
        "model": f"{benchmark.model} ({benchmark.model_type})",
        **({"candidate": benchmark.candidate} if benchmark.candidate else {}),
        "requests": f"{benchmark.prompt_length} prompt tokens, at most {benchmark.max_new_tokens} new ones",
    }


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("engine", no_wrap=True, vertical="bottom")
    table.add_column("strategy")
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = _figures(row.figures) if row.figures else ["-"] * len(COLUMNS)
        table.add_row(row.engine, row.strategy, *figures)
    return table


def _figures(figures: Figures) -> list[str]:
    further = figures.further_token
    return [
        _three_digits(figures.tokens_per_second),
        _three_digits(figures.times_first_row),
        _three_digits(figures.first_token.median * 1e3),
        _three_digits(further.median * 1e3 if further else None),
        _three_digits(further.p95 * 1e3 if further else None),
        _three_digits(figures.peak_bytes / 1e6 if figures.peak_bytes else None),
        f"{figures.share_of_roofline:.2f}",
    ]


def _three_digits(value: float | None) -> str:
    """Three significant digits, more before the point when needed; a dash when there is no value."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why rows have no figures: one line for each reason, naming the rows."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault((row.engine, row.reason), []).append(row.strategy)
    return [f"{engine} ({'; '.join(strategies)}): {reason}" for (engine, reason), strategies in reasons.items()]
