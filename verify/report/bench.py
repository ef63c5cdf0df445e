"""The result of a benchmark, as data. Fields are those of its JSON report."""

from collections.abc import Sequence
from dataclasses import dataclass, field

SCHEMA = 1


@dataclass(frozen=True)
class Spread:
    """Seconds: the median, and the 95th percentile."""

    median: float
    p95: float


@dataclass(frozen=True)
class Figures:
    """What one row gave, in medians of its turns.

    Attributes:
        tokens_per_second: new tokens of all requests together, from their prompts to the last of them.
        first_token: seconds from the start, when all requests came, to the first token of each.
        further_token: seconds from each token to the next of the same request; None where each got one token.
        peak_bytes: the most memory of its process while it decoded (where the system cannot tell that from opening the
            model, ever); None where it cannot tell at all.
        times_first_row: tokens a second in those of the first row, the two taking turns; None where that one failed.
        share_of_roofline: the least time that the roofline of each pass allows, divided by the time taken.
    """

    tokens_per_second: float
    first_token: Spread
    further_token: Spread | None
    peak_bytes: int | None
    times_first_row: float | None
    share_of_roofline: float


@dataclass(frozen=True)
class Row:
    """One strategy on one engine. Where it could not be measured, `figures` is None and `reason` says why.

    Attributes:
        batch_size: most rows at once.
        requests: how many were met in each turn.
        new_tokens: of all of them together.
    """

    engine: str
    strategy: str
    batch_size: int
    requests: int
    new_tokens: int
    figures: Figures | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Curve:
    """Seconds for the token at each position, counted from 1."""

    name: str
    positions: Sequence[int]
    seconds: Sequence[float]


@dataclass(frozen=True)
class Machine:
    """Where the figures come from.

    Attributes:
        text: processor and versions, on one line.
        bandwidth: bytes a second, as NumPy reads them.
        flops: FLOPs a second in float32, as NumPy computes them.
    """

    text: str
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Benchmark:
    """A whole benchmark.

    Attributes:
        candidate: the export's path; None where the reference alone was measured.
        prompt_length: tokens of every prompt.
        max_new_tokens: of every request, but for the shorter ones of continuous batching.
        curves: empty where no plot was asked for.
    """

    machine: Machine
    model: str
    model_type: str
    candidate: str | None
    prompt_length: int
    max_new_tokens: int
    rows: Sequence[Row]
    curves: Sequence[Curve] = ()
    schema: int = field(default=SCHEMA)
