"""What was found of one export of the corpus, and how it is kept in a file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from verify.drive import CandidateRun

Kind = Literal["catalogue", "stacked", "outside", "driver", "clean"]


@dataclass(frozen=True)
class Others:
    """What other ways of comparing would have said of the same run: True is "the same"."""

    tokens: bool
    polygraphy: bool
    allclose: bool
    nmse: bool

    @classmethod
    def of(cls, free: CandidateRun, forced: CandidateRun, right: Sequence[np.ndarray], tokens: Any) -> "Others":
        """From a free run, and from logits after the same tokens."""
        given, exact = np.concatenate(forced.logits).astype(np.float64), np.concatenate(right)
        error = np.abs(given - exact)
        # Polygraphy 0.53, CompareFunc.simple: an element fails where it exceeds both tolerances.
        fails = (error > 1e-5) & (error > 1e-5 * np.abs(exact))
        return cls(
            tokens=free.tokens == tokens,
            polygraphy=not fails.any(),
            allclose=bool(np.allclose(given, exact, rtol=1e-3, atol=1e-3)),
            nmse=float(np.mean(error**2) / np.mean(exact**2)) < 1e-2,
        )


@dataclass(frozen=True)
class Row:
    """What was found of one export.

    Attributes:
        causes: what it has to be named; empty where nothing in the catalogue is right, or nothing is wrong.
        layers: that have the fault; None: all of them, or none in particular.
        effect: the noise ratio in units of the bound.
        status: of the diagnosis; "none" where there was nothing to explain.
        named: causes that explain everything, equivalent ones too.
        nearest: the best that was ruled out.
        layer, point, node: where it was located; -1 is no layer at all, None that it was not located.
        node_right: whether that node is one that the fault has changed; None where it changed none.
        others: what other ways of comparing say; None where they were not asked.
        seconds: of the comparison, and of finding the place and the cause.
        error: what stopped it.
    """

    name: str
    kind: Kind
    causes: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    verdict: str = "no-verdict"
    effect: float = 0.0
    status: str = "none"
    named: tuple[str, ...] = ()
    nearest: str = ""
    layer: int | None = None
    point: str | None = None
    node: str | None = None
    node_right: bool | None = None
    notes: tuple[str, ...] = ()
    others: Others | None = None
    seconds: tuple[float, float] = (0.0, 0.0)
    error: str | None = None


def as_json(row: Row) -> dict[str, Any]:
    """A row as it is kept in a file."""
    return asdict(row)


def from_json(kept: dict[str, Any]) -> Row:
    """The row of `as_json`."""
    tuples = {name: tuple(kept[name]) for name in ("causes", "named", "notes", "seconds")}
    layers = None if kept["layers"] is None else tuple(kept["layers"])
    others = None if kept["others"] is None else Others(**kept["others"])
    return Row(**{**kept, **tuples, "layers": layers, "others": others})
