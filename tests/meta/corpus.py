"""The corpus of faults: every export that has a mistake in it, compared and diagnosed as a user's would be."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.errors import InputError
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.meta.changed_nodes import blamable
from tests.meta.drivers import Driven, NotReset, losing
from tests.meta.rows import Kind, Others, Row
from tests.verify.comparing import Compared, Here, Notes
from verify.candidates import Candidate
from verify.candidates.files import describe_candidate
from verify.candidates.graph_constants import graph_constants
from verify.compare import CacheMode, Comparison, Request
from verify.drive import CandidateRun
from verify.errors import NoVerdict
from verify.expect import EXACT
from verify.export import export_decoder
from verify.export.faults import FAULTS, outside, stacked
from verify.export.faults.frozen import frozen_faults
from verify.export.faults.writing import Fault
from verify.find_cause import find_cause
from verify.own_weights import read_weights
from verify.report.result import Diagnosis, Location

TEXTS = (
    "If the expression is true, the first value is returned; otherwise the second one is, and nothing else",
    "A class definition is an executable statement",
    "Return",
)
NEW_TOKENS = 8
FIRST_OUT_OF_ORDER = (2,)  # of 0, 1, 10, 11, 2, ...
MODES: Sequence[CacheMode] = ("off", "on")
ANOTHER_MODEL = "mistral-"  # begins the names of exports that are not of the tiny Llama
# What ought not to happen, whatever is wrong with an export; a row that says so tells more than a traceback.
FAILURES = (InputError, NoVerdict, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
EXPLAINING = ("confirmed", "equivalent")


def not_mistaken(candidate: Candidate) -> Any:
    """The candidate in a loop without a mistake."""
    return candidate


class Watched(Here):
    """A candidate of this very process, whose runs are kept; each begins in a loop of its own."""

    def __init__(self, candidate: Any, mistaken: Callable[[Candidate], Any] = not_mistaken):
        super().__init__(candidate)
        self._right, self._mistaken = candidate, mistaken
        self.runs: list[CandidateRun] = []

    def decode(self, *arguments: Any, **how: Any) -> CandidateRun:
        self._candidate = self._mistaken(self._right)
        self.runs.append(super().decode(*arguments, **how))
        return self.runs[-1]


@dataclass(frozen=True)
class Corpus:
    """A model, prompts that show every fault, and where exports of it by other exporters are.

    Attributes:
        seconds: for finding the cause of one fault; None: it is compared, and neither located nor diagnosed.
    """

    compared: Compared
    exports: Path
    seconds: float | None = 120.0

    @property
    def checkpoint(self) -> Checkpoint:
        """The model."""
        return self.compared.checkpoint

    def faults(self) -> list[tuple[Kind, Fault]]:
        """Every fault that this model can show."""
        layers = self.checkpoint.config.num_hidden_layers
        rows: list[tuple[Kind, Fault]] = [("catalogue", fault) for fault in (*FAULTS, *frozen_faults(self.exports))]
        rows += [("stacked", fault) for fault in (*stacked.FAULTS, *stacked.frozen_pairs(self.exports))]
        rows += [("outside", fault) for fault in outside.FAULTS]
        return [row for row in rows if layers > 10 or "ten layers" not in row[1].needs]

    def row(self, kind: Kind, fault: Fault) -> Row:
        """Writes an export that has a fault, and finds out what can be found."""
        causes = tuple(cause for cause in (fault.cause, fault.beside) if cause is not None)
        last_norm = self.checkpoint.config.num_hidden_layers  # as a fault counts it
        layers = None if fault.layers is None else tuple(sorted(fault.layers - {last_norm}))
        if "ten layers" in fault.needs:
            layers = FIRST_OUT_OF_ORDER
        row = Row(fault.name, kind, causes, layers)
        with TemporaryDirectory() as directory:

            def made() -> Row:
                path = fault.write(self.checkpoint, Path(directory) / "model.onnx")
                return self.examined(path, row, fault.source or self._own(directory))

            return _or_what_stopped_it(row, made)

    def _own(self, directory: str) -> Path:
        path = Path(directory) / "clean.onnx"
        export_decoder(self.checkpoint, path)
        return path

    def examined(
        self,
        path: Path,
        row: Row,
        clean: Path | None,
        *,
        mistaken: Callable[[Candidate], Any] = not_mistaken,
        **request_of: Any,
    ) -> Row:
        """What is found of an export: the verdict, and where that is not equal, the place and the cause.

        Args:
            path: the export.
            row: what is known before.
            clean: the export without the fault; None where the fault is not in it.
            mistaken: makes of the candidate one in a loop with a mistake.
            request_of: what is asked for besides the prompts.
        """
        began = perf_counter()
        own, _ = read_weights(self.checkpoint, describe_candidate(path))
        candidate = Watched(self.compared.open(path), mistaken)
        mode: CacheMode = "on" if candidate.interface.has_cache else "off"
        request = Request(self.compared.prompts, self.compared.max_new_tokens, modes=(mode,), **request_of)
        comparison = Comparison(self.checkpoint, request, Notes(), self.compared.reference, own)
        (cell,) = comparison.cells(candidate)
        if cell.noise_ratio is None:
            return replace(row, error=cell.reason)
        effect = cell.noise_ratio.logits / cell.noise_ratio.bound
        row = replace(row, verdict=cell.verdict, effect=effect, others=self._others(candidate))
        compared = perf_counter()
        if comparison.unequal is None or self.seconds is None:
            return replace(row, seconds=(compared - began, 0.0))
        constants = graph_constants(path, self.checkpoint.config)
        diagnosis = find_cause(self.checkpoint, own, candidate, comparison.unequal, constants, self.seconds, Notes())
        row = with_diagnosis(replace(row, seconds=(compared - began, perf_counter() - compared)), diagnosis)
        return with_location(row, diagnosis.location, clean, path)

    def driven(self) -> Iterator[Row]:
        """Rows of a right export in a loop that makes a mistake with its cache."""
        alone = {"batch_size": 1}  # so that a batch is followed by one of as many rows
        loops: Sequence[tuple[str, str, Callable[[Candidate], Any], dict[str, int]]] = (
            ("the newest slot is lost", "cache-truncated", partial(_losing, lambda held: slice(held - 1)), {}),
            ("the 2 oldest slots are lost", "cache-truncated", partial(_losing, lambda held: slice(2, held)), alone),
            ("the cache is kept", "cache-not-reset", partial(NotReset, go_on=False), alone),
            ("the cache is kept, and positions go on", "cache-not-reset", partial(NotReset, go_on=True), alone),
        )
        with TemporaryDirectory() as directory:
            path = self._own(directory)
            for name, cause, mistaken, batches in loops:
                row = Row(name, "driver", (cause,))
                examined = partial(self.examined, path, row, None, mistaken=mistaken, **batches)
                yield _or_what_stopped_it(row, examined)

    def exported(self) -> Iterator[tuple[str, Path]]:
        """Exports without a fault: this project's own is made, and those of other exporters are there."""
        with TemporaryDirectory() as directory:
            yield "own", self._own(directory)
        for export in sorted(self.exports.iterdir()):
            for file in ("model.onnx", "openvino_model.xml"):
                if (export / file).is_file() and not export.name.startswith(ANOTHER_MODEL):
                    yield export.name, export / file

    def clean(self, name: str, path: Path, runtime: str) -> Iterator[Row]:
        """The verdicts on an export without a fault, with the cache and without it, by its own account of itself."""
        own, _ = read_weights(self.checkpoint, describe_candidate(path))
        candidate = Watched(self.compared.open(path, runtime))
        reference = self.compared.reference
        for mode in MODES if candidate.interface.has_cache else MODES[:1]:
            candidate.runs.clear()
            request = Request(self.compared.prompts, self.compared.max_new_tokens, modes=(mode,), expectation=None)
            (cell,) = Comparison(self.checkpoint, request, Notes(), reference, own).cells(candidate)
            row = Row(f"{name} on {runtime}, cache {mode}", "clean", verdict=cell.verdict, error=cell.reason)
            if cell.noise_ratio is not None:
                effect = cell.noise_ratio.logits / cell.noise_ratio.bound
                # Another tolerance is no test of int4 or bfloat16: only float32 has to pass it.
                others = self._others(candidate) if cell.expect == EXACT.name else None
                row = replace(row, effect=effect, others=others)
            yield row

    def _others(self, candidate: Watched) -> Others:
        reference = self.compared.reference
        ends = np.cumsum(reference.lengths)
        free, forced = candidate.runs[0], candidate.runs[-1]
        right = [
            reference.logits.value64_PX[end - len(given) : end] for end, given in zip(ends, forced.logits, strict=True)
        ]
        return Others.of(free, forced, right, reference.tokens)


def _or_what_stopped_it(row: Row, made: Callable[[], Row]) -> Row:
    try:
        return made()
    except FAILURES as error:
        return replace(row, error=f"{type(error).__name__}: {error}")


def _losing(slots: Callable[[int], slice], candidate: Candidate) -> Driven:
    return Driven(candidate, losing(slots))


def corpus_of(model: Path, exports: Path, seconds: float = 120.0) -> Corpus:
    """The corpus of a model, with prompts of different lengths: the longest shows a short table, the others padding."""
    checkpoint, tokenizer = open_checkpoint(model), load_tokenizer(model)
    prompts = [encode_prompt(tokenizer, text, chat=False) for text in TEXTS]
    return Corpus(Compared(checkpoint, prompts, NEW_TOKENS), exports, seconds)


def with_diagnosis(row: Row, diagnosis: Diagnosis) -> Row:
    """A row with the causes that were found."""
    named = tuple(dict.fromkeys(cause.name for cause in diagnosis.causes if cause.status in EXPLAINING))
    left = [cause for cause in diagnosis.causes if cause.status == "ruled-out"]
    best = min(left, key=lambda cause: cause.noise_ratio.after, default=None)
    nearest = "" if best is None else f"{best.name} ({best.noise_ratio.after:.3g} of {best.noise_ratio.before:.3g})"
    return replace(row, status=diagnosis.status, named=named, nearest=nearest, notes=diagnosis.notes)


def with_location(row: Row, where: Location | None, clean: Path | None, path: Path) -> Row:
    """A row with the place that was found."""
    if where is None or where.point is None:
        return row
    node = where.node and where.node.rpartition(" (")[0]
    changed = None if clean is None else blamable(clean, path)
    node_right = None if not changed else node in changed
    return replace(
        row, layer=-1 if where.layer is None else where.layer, point=where.point, node=node, node_right=node_right
    )
