"""What the rows of the corpus come to: scores, a confusion matrix, and what other ways of comparing would have said."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

from tests.meta.rows import Others, Row

SURELY = 3.0  # times the bound: an effect beyond it has to be detected
OUTSIDE, NOTHING = "(none in the catalogue)", "(unexplained)"


@dataclass(frozen=True)
class Score:
    """So many of so many, and the share of them that is asked for."""

    what: str
    right: int
    of: int
    asked: float

    @property
    def is_met(self) -> bool:
        """Whether it is enough."""
        return self.right >= self.asked * self.of


def is_detected(row: Row) -> bool:
    """Whether the verdict says that something is wrong."""
    return row.verdict in ("drift", "mismatch")


def is_layer_right(row: Row) -> bool:
    """Whether the first layer that has the fault was found: that of all layers is the first, -1 is none."""
    expected = 0 if row.layers is None else min(row.layers, default=-1)
    return row.layer == expected


def is_named(row: Row) -> bool:
    """Whether all that is wrong was named, and no cause but those and their equivalents."""
    return row.status in ("named", "ambiguous") and bool(row.causes) and set(row.causes) <= set(row.named)


def is_misnamed(row: Row) -> bool:
    """Whether a cause was named, and not the right one."""
    return row.status in ("named", "ambiguous") and not is_named(row)


def scores(rows: Sequence[Row]) -> list[Score]:
    """Those that are asked for."""
    clean = [row for row in rows if row.kind == "clean"]
    faulty = [row for row in rows if row.kind != "clean"]
    strong = [row for row in faulty if row.error or row.effect > SURELY]
    seen = [row for row in faulty if is_detected(row)]
    known = [row for row in seen if row.causes]
    outside = [row for row in seen if not row.causes]
    with_node = [row for row in seen if row.node_right is not None]
    return [
        _score("detected", strong, is_detected, 1.0),
        _score("clean exports equal", clean, lambda row: row.verdict == "equal", 1.0),
        _score("layer right", [row for row in seen if row.kind != "driver"], is_layer_right, 0.98),
        _score("node right", with_node, lambda row: bool(row.node_right), 0.95),
        _score("named, and nothing else", known, is_named, 0.95),
        _score("not misnamed", seen, lambda row: not is_misnamed(row), 1.0),
        _score("rightly unexplained", outside, lambda row: row.status == "unexplained", 1.0),
        _score("unexplained and rightly located", outside, is_layer_right, 1.0),
    ]


def _score(what: str, rows: Sequence[Row], is_right: Callable[[Row], bool], asked: float) -> Score:
    return Score(what, sum(map(is_right, rows)), len(rows), asked)


def confusion(rows: Sequence[Row]) -> dict[tuple[str, str], int]:
    """How often which cause was called what; a right name counts as itself, whatever is equivalent to it."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if is_detected(row):
            true = " + ".join(row.causes) or OUTSIDE
            counts[true, true if is_named(row) else " / ".join(row.named) or NOTHING] += 1
    return dict(counts)


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Scores, confusion, other ways of comparing, and what went wrong, as lines of Markdown."""
    yield from table(
        ["", "right", "of", "asked", ""],
        [[s.what, s.right, s.of, f"{s.asked:.0%}", "" if s.is_met else "missed"] for s in scores(rows)],
    )
    yield from table(
        ["fault", "faults", "named rightly", "unexplained", "called otherwise"], list(_by_cause(confusion(rows)))
    )
    yield from table(["of the same runs", "faults found", "clean float32 exports passed"], list(_by_other(rows)))
    wrong = [[row.name, what] for row in rows for what in faults_of(row)]
    if wrong:
        yield from table(["export", "what is not right"], wrong)


def table(headings: Sequence[str], lines: Sequence[Sequence[object]]) -> Iterator[str]:
    """A table in Markdown, and an empty line."""
    for line in (headings, ["---"] * len(headings), *lines):
        yield f"| {' | '.join(map(str, line))} |"
    yield ""


def _by_cause(counts: dict[tuple[str, str], int]) -> Iterator[list[object]]:
    for true in sorted({true for true, _ in counts}):
        of_it = {called: count for (each, called), count in counts.items() if each == true}
        others = [f"{called} ({count})" for called, count in of_it.items() if called not in (true, NOTHING)]
        right, unexplained = of_it.get(true, 0), of_it.get(NOTHING, 0)
        named = "" if true == OUTSIDE else f"{right}"
        yield [true, sum(of_it.values()), named, unexplained or "", ", ".join(others)]


def _by_other(rows: Sequence[Row]) -> Iterator[list[object]]:
    names = {
        "tokens": "greedy tokens",
        "polygraphy": "Polygraphy's default (1e-5)",
        "allclose": "`allclose` at 1e-3",
        "nmse": "NMSE below 1e-2",
    }
    compared = [row for row in rows if row.others is not None]
    faulty = [row for row in compared if row.kind != "clean"]
    clean = [row for row in compared if row.kind == "clean"]
    for other in fields(Others):
        found = sum(not vars(row.others)[other.name] for row in faulty)
        passed = sum(vars(row.others)[other.name] for row in clean)
        yield [names[other.name], f"{found} of {len(faulty)}", f"{passed} of {len(clean)}"]
    found, passed = sum(map(is_detected, faulty)), sum(row.verdict == "equal" for row in clean)
    yield ["`verify compare`", f"{found} of {len(faulty)}", f"{passed} of {len(clean)}"]


def faults_of(row: Row) -> Iterator[str]:
    """What of a row is not as it should be."""
    if row.error:
        yield f"no verdict: {row.error}"
        return
    if row.kind == "clean":
        if row.verdict != "equal":
            yield f"{row.verdict}, {row.effect:.3g} times the bound"
        return
    if not is_detected(row):
        if row.effect > SURELY:
            yield f"not detected at {row.effect:.3g} times the bound"
        return
    if row.causes and not is_named(row):
        yield f"{row.status} {', '.join(row.named)} for {', '.join(row.causes)}; nearest {row.nearest}"
    if not row.causes and row.status != "unexplained":
        yield f"called {', '.join(row.named)}"
    if row.kind != "driver" and not is_layer_right(row):
        expected = "the first" if row.layers is None else row.layers
        yield f"located in layer {row.layer}, {row.point}, not in {expected}; {'; '.join(row.notes)}"
    if row.node_right is False:
        yield f"node {row.node} ({row.point})"
