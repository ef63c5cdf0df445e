"""The fault corpus: how many faults are detected, located and named, and what other comparisons say of the same runs.

    python -m benchmarks.faults [MODEL [EXPORTS]] [--only TEXT] [--every N] [--seconds S] [--kept FILE]

Every fault of the catalogue, some in pairs, and some outside of it, is written into an export of MODEL (the tiny model
that is part of the project) or into one of EXPORTS (those of other exporters, each in a directory of its name); each is
compared, located and diagnosed on ONNX Runtime. Every export without a fault is compared on every runtime that is
installed. Prints tables in Markdown. With --kept, rows go to FILE as they are made, and those that are in it are not
made again.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers import machine
from tests.meta.corpus import NEW_TOKENS, TEXTS, Corpus, corpus_of
from tests.meta.rows import Row, as_json, from_json
from tests.meta.scores import tables
from verify.runtimes import USUAL

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL, EXPORTS = FIXTURES / "tiny_llama", FIXTURES / "exports"
SECONDS = 120.0


def main(
    model: Path = MODEL,
    exports: Path = EXPORTS,
    only: str = "",
    every: int = 1,
    seconds: float = SECONDS,
    kept: Path | None = None,
) -> list[Row]:
    """Makes all rows, prints what they come to, and returns them."""
    done = {} if kept is None or not kept.is_file() else {row.name: row for row in map(_kept, kept.open())}
    rows = []
    for row in _rows(corpus_of(model, exports, seconds), only, every, done):
        rows.append(row)
        if kept is not None and row.kind not in ("clean", "driver") and row.name not in done:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(as_json(row)) + "\n")
    print(f"{machine()}; {model.name}, {len(TEXTS)} prompts, {NEW_TOKENS} new tokens each\n")
    print("\n".join(tables(rows)))
    return rows


def _kept(line: str) -> Row:
    return from_json(json.loads(line))


def _rows(made: Corpus, only: str, every: int, done: dict[str, Row]) -> Iterator[Row]:
    for runtime in USUAL:
        for name, path in made.exported():
            if only in f"clean: {name}" and (runtime == "openvino" or path.suffix == ".onnx"):
                for row in made.clean(name, path, runtime):
                    print(_line(row), file=sys.stderr, flush=True)
                    yield row
    if only in "driver: ":
        for row in made.driven():
            print(_line(row), file=sys.stderr, flush=True)
            yield row
    faults = [(kind, fault) for kind, fault in made.faults() if only in f"{kind}: {fault.name}"][::every]
    for number, (kind, fault) in enumerate(faults, start=1):
        row = done.get(fault.name) or made.row(kind, fault)
        print(f"[{number}/{len(faults)}] {_line(row)}", file=sys.stderr, flush=True)
        yield row


def _line(row: Row) -> str:
    named = ", ".join(row.named) or "-"
    place = f"layer {row.layer} {row.point} {row.node} {row.node_right}"
    seconds = "+".join(f"{each:.1f}" for each in row.seconds)
    return f"{row.name}: {row.error or f'{row.verdict} {row.effect:.3g}, {row.status} {named}; {place}; {seconds} s'}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="The fault corpus.")
    parser.add_argument("model", type=Path, nargs="?", default=MODEL, metavar="MODEL")
    parser.add_argument("exports", type=Path, nargs="?", default=EXPORTS, metavar="EXPORTS")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="those with this in their kind and name, as in 'outside: no MLP'"
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="each N-th fault: all of them take hours on a large model"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="to look for one cause (default %(default)s)"
    )
    parser.add_argument("--kept", type=Path, metavar="FILE", help="rows that were made, to go on from")
    return parser.parse_args()


if __name__ == "__main__":
    given = _options()
    main(given.model, given.exports, given.only, given.every, given.seconds, given.kept)
