"""The verdicts on what real exporters write: each export on each runtime that opens it, with its cache and without.

    python -m fixtures.exporters MODEL EXPORTS
    python -m benchmarks.matrix MODEL EXPORTS [--runtime RUNTIME ...]

Every subdirectory of EXPORTS is compared with MODEL twice: held against the checkpoint in float32, and against what
its weights and its runtime's settings say of themselves (`--expect auto`). Prints a table in Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import machine

RUNTIMES = ("ort-cpu", "ort-openvino", "openvino")
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time there was a")
NEW_TOKENS = 16
HEADINGS = (
    *("export", "runtime", "cache", "float32", "noise (bound)", "tokens"),
    *("held against", "verdict", "noise (bound)"),
)


@dataclass(frozen=True)
class Row:
    """One export on one runtime in one cache mode: its cell against float32, and the one by its own account."""

    export: str
    runtime: str
    float32: dict[str, Any]
    auto: dict[str, Any]


def main(model: Path, exports: Path, runtimes: Sequence[str] = RUNTIMES) -> list[Row]:
    """Compares everything with everything, and prints and returns the rows."""
    rows = []
    print(f"{machine()}; {len(PROMPTS)} prompts, {NEW_TOKENS} new tokens each\n")
    print(_line(HEADINGS), _line(["---"] * len(HEADINGS)), sep="\n")
    for export in sorted(path for path in exports.iterdir() if path.is_dir()):
        for runtime in runtimes:
            if _opens(runtime, export):
                for row in compared(model, export, runtime):
                    rows.append(row)
                    print(_line(_columns(row)), flush=True)
    return rows


def compared(model: Path, export: Path, runtime: str) -> Iterator[Row]:
    """A row for each cache mode."""
    cells = [_cells(model, export, runtime, expect) for expect in ("float32", "auto")]
    for float32, auto in zip(*cells, strict=True):
        yield Row(export.name, runtime, float32, auto)


def _opens(runtime: str, export: Path) -> bool:
    """Whether a runtime takes files of this kind: OpenVINO's own are for OpenVINO itself."""
    return runtime == "openvino" or not list(export.glob("*.xml"))


def _cells(model: Path, export: Path, runtime: str, expect: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        command = [sys.executable, "-m", "verify", "compare", model, export, "--runtime", runtime]
        command += ["--expect", expect, "--max-new-tokens", str(NEW_TOKENS), "--no-diagnose", "--json", report]
        for prompt in PROMPTS:
            command += ["--prompt", prompt]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if not report.is_file():
            raise SystemExit(f"{export}, {runtime}: {done.stderr.strip()}")
        cells: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["cells"]
        return cells


def _columns(row: Row) -> list[str]:
    of_float32, of_auto = _figures(row.float32), _figures(row.auto)
    return [row.export, row.runtime, row.float32["cache"], *of_float32, row.auto["expect"], *of_auto[:2]]


def _figures(cell: dict[str, Any]) -> tuple[str, str, str]:
    tokens, noise = cell["tokens"], cell["noise_ratio"]
    if tokens is None or noise is None:
        return cell["verdict"], "", ""
    ratio = f"{_short(noise['logits'])} ({_short(noise['bound'])})"
    return cell["verdict"], ratio, f"{tokens['equal']}/{tokens['compared']}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _line(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description="Verdicts on real exports.")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("exports", type=Path, metavar="EXPORTS")
    parser.add_argument("--runtime", action="append", help=f"repeatable; default {', '.join(RUNTIMES)}")
    return parser.parse_args()


if __name__ == "__main__":
    options = _options()
    main(options.model, options.exports, options.runtime or RUNTIMES)
