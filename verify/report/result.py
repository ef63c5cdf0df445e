"""The result of a comparison, as data. Fields are those of the JSON report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from verify.report.weights import ExportedWeights

Verdict = Literal["equal", "drift", "mismatch", "no-verdict"]
SCHEMA = 1


@dataclass(frozen=True)
class FirstMismatch:
    """The first step at which the candidate chose another token, the noise not explaining it.

    `margin` is by how much the reference prefers its own token, in logits.
    """

    row: int
    step: int
    expected: int
    actual: int
    margin: float


@dataclass(frozen=True)
class Difference:
    """A step at which the candidate's token is not the reference's choice after the same tokens.

    Attributes:
        rank: 1 and how many tokens the reference gives more than the candidate's.
        margin: by how much it prefers its own, in logits.
        tie: whether float32 noise explains it.
    """

    row: int
    step: int
    expected: int
    actual: int
    rank: int
    margin: float
    tie: bool


@dataclass(frozen=True)
class Tokens:
    """Greedy choices compared: `ties` differ within the noise floor, judged on the reference's margin."""

    compared: int
    equal: int
    ties: int
    first_mismatch: FirstMismatch | None


@dataclass(frozen=True)
class Worst:
    """Where the noise ratio is largest: a trace point, and the row and position in it."""

    point: str
    row: int
    position: int
    ratio: float


@dataclass(frozen=True)
class NoiseRatio:
    """The candidate's error in units of honest float32 noise.

    Attributes:
        logits: over all positions together.
        bound: up to where `logits` counts as honest.
        worst_position: of the logits, the position with the largest ratio.
        position_bound: up to where that counts as honest.
        cache: over all positions of each layer's keys and values, by trace point; empty where the export gives none.
        cache_beyond: the points of `cache` beyond what honest arithmetic explains; in float32 no part of the verdict,
            since with the cache wrong keys and values show in the logits, and without it nobody reads them.
        worst: the largest ratio at any position of any point compared.
    """

    logits: float
    bound: float
    worst_position: Worst
    position_bound: float
    cache: Mapping[str, float]
    cache_beyond: tuple[str, ...]
    worst: Worst

    @property
    def has_logits_within(self) -> bool:
        """Whether the logits are within their bounds, over all positions and at each."""
        # Written so that NaN, which compares false with everything, is never within a bound.
        return self.logits <= self.bound and self.worst_position.ratio <= self.position_bound


@dataclass(frozen=True)
class Judgement:
    """A run held against one reference: on the checkpoint's weights, or on those that the export holds."""

    weights: Literal["checkpoint", "export"]
    verdict: Verdict
    tokens: Tokens
    noise_ratio: NoiseRatio


@dataclass(frozen=True)
class LogProbs:
    """Differences of log-probabilities from the reference's, in nats, where a candidate gives those of some tokens."""

    compared: int
    largest: float
    rms: float


@dataclass(frozen=True)
class Seconds:
    """Wall time spent in each side; of a candidate that ran elsewhere it is not known."""

    candidate: float | None
    reference: float


@dataclass(frozen=True)
class Cell:
    """One runtime in one cache mode, at most `batch_size` rows at a time (None where another system does not say).

    Where there is no verdict, `reason` says why and the figures are None. `noise_ratio` is that of the
    log-probabilities where `logprobs` stand for the logits, and None where there is neither. Of what another system
    decoded, `differences` lists every step whose token is not the reference's choice. `peak_memory_bytes` is the
    candidate's, the files that it maps included, and `output` the last lines that it wrote.
    """

    runtime: str
    cache: Literal["on", "off", "unknown"]
    settings: Mapping[str, Mapping[str, Any]]
    verdict: Verdict
    batching: Literal["static", "dynamic", "continuous"] | None
    batch_size: int | None
    tokens: Tokens | None = None
    noise_ratio: NoiseRatio | None = None
    seconds: Seconds | None = None
    reason: str | None = None
    expect: str = "float32"  # what it was held against
    also: Judgement | None = None  # on the other weights, where the export's are not the checkpoint's
    explained_by: str | None = None  # another expectation, that of its own settings, under which it is equal
    logprobs: LogProbs | None = None
    differences: tuple[Difference, ...] = ()
    peak_memory_bytes: int | None = None
    output: tuple[str, ...] = ()


@dataclass(frozen=True)
class Residual:
    """The noise ratio of what is to be explained, and what is left of it when the reference has the mistake too."""

    before: float
    after: float


@dataclass(frozen=True)
class CauseFound:
    """A cause of the catalogue that was tried.

    Attributes:
        parameters: of the mistake, as `rms_norm_eps` of `norm-eps`.
        layers: where it is; None: in all of them; empty: beside them, as in the head or the last norm.
        noise_ratio: None where the tokens alone were recorded.
        status: it is the cause (`confirmed`), explains as much as the cause does (`equivalent`), or does not.
        fix: what puts it right.
    """

    name: str
    parameters: Mapping[str, Any]
    layers: tuple[int, ...] | None
    noise_ratio: Residual | None
    status: Literal["confirmed", "equivalent", "ruled-out"]
    fix: str = ""


@dataclass(frozen=True)
class Location:
    """Where a candidate first leaves the noise; None where that is not known.

    Attributes:
        layer: of the decoder.
        point: the trace point in it, or that of the whole model.
        node: of the graph, its operator and the provider that ran it in brackets.
        rung: of the ladder of blame.
        detail: position, phase and heads, in words.
    """

    layer: int | None = None
    point: str | None = None
    node: str | None = None
    rung: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What is known of why a candidate is not equal.

    Attributes:
        status: `named`: one cause explains all of it, and no other does; `ambiguous`: several do; `unexplained`.
        causes: those that explain all of it, or else the best that was found, and then what was ruled out.
        notes: what was not tried, and what would tell several causes apart.
        untried: the one of them that says why no cause could be tried at all; empty where causes could be.
    """

    status: Literal["named", "ambiguous", "unexplained"]
    causes: tuple[CauseFound, ...] = ()
    location: Location | None = None
    notes: tuple[str, ...] = ()
    untried: str = ""


@dataclass(frozen=True)
class Model:
    """The checkpoint compared against."""

    path: str
    model_type: str
    sha256: str


@dataclass(frozen=True)
class Exported:
    """The candidate's file; or a server's address, whose `sha256` is empty."""

    path: str
    exporter: str
    sha256: str


@dataclass(frozen=True)
class Report:
    """A whole comparison.

    Attributes:
        notes: what the reader has to know of how it was compared (rows fed one by one, an export without a cache).
        not_revealed: what these prompts could not have shown.
        weights: what became of the checkpoint's in the export; None where that is not known.
        diagnosed: what was found of the cause of the first cell that is neither equal nor explained by its settings.
    """

    model: Model
    candidate: Exported
    prompts: int
    max_new_tokens: int
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    not_revealed: tuple[str, ...] = ()
    weights: ExportedWeights | None = None
    diagnosed: Diagnosis | None = None
    schema: int = field(default=SCHEMA)

    @property
    def verdict(self) -> Verdict:
        """The worst of the cells: a mismatch before drift, before a cell without a verdict."""
        verdicts = {cell.verdict for cell in self.cells}
        order: tuple[Verdict, ...] = ("mismatch", "drift", "no-verdict", "equal")
        return next(verdict for verdict in order if verdict in verdicts)

    @property
    def diagnosis(self) -> Literal["none", "named", "ambiguous", "unexplained"]:
        """Whether there is something to explain, and whether it is: by a candidate's own settings, or by a cause.

        A record whose every token is right may still be that of a loop with a mistake: one that does not end.
        """
        if self.verdict not in ("drift", "mismatch"):
            return self.diagnosed.status if self.diagnosed else "none"
        if self.is_explained_by_settings:
            return "named"
        return self.diagnosed.status if self.diagnosed else "unexplained"

    @property
    def is_explained_by_settings(self) -> bool:
        """Whether every cell that is not equal would be, held against what its own settings and weights say."""
        wrong = [cell for cell in self.cells if cell.verdict in ("drift", "mismatch")]
        return bool(wrong) and all(cell.explained_by is not None for cell in wrong)

    @property
    def exit_code(self) -> int:
        """0 equal, 1 drift or mismatch, 3 no verdict."""
        return {"equal": 0, "drift": 1, "mismatch": 1, "no-verdict": 3}[self.verdict]
