"""The diagnosis of one run, as `compare` comes to it, for tests of the cause."""

from pathlib import Path
from typing import Any

from refengine.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.verify.comparing import Compared, Here, Notes
from verify.candidates import Candidate
from verify.candidates.files import describe_candidate
from verify.candidates.graph_constants import graph_constants
from verify.compare import Comparison
from verify.find_cause import find_cause
from verify.own_weights import read_weights
from verify.report.result import Diagnosis
from verify.request import Request

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5])


def small_model(directory: Path, **config: Any) -> Compared:
    """A random model of three layers, and two ragged prompts; `config` are keys that differ."""
    return Compared(open_checkpoint(write_checkpoint(directory / "checkpoint", **config)), PROMPTS, 3)


def diagnosed(
    compared: Compared, path: Path, runtime: str = "ort-cpu", seconds: float = 0.0, **options: str
) -> Diagnosis:
    """Of an export that is not equal; `options` are those of the provider."""
    return diagnosis_of(compared, compared.open(path, runtime, options), seconds)


def diagnosis_of(
    compared: Compared, candidate: Candidate, seconds: float = 0.0, repro: Path | None = None, **asked: Any
) -> Diagnosis:
    """Of a candidate that is open and not equal, with the cache where it has one.

    Args:
        compared: the model, and what it was asked.
        candidate: the export on a runtime.
        seconds: for trying causes; in none of them, nothing but what the runtime itself does can be named.
        repro: where the smallest graph that shows it is written.
        asked: what is asked for besides the prompts.
    """
    mode = "on" if candidate.interface.has_cache else "off"
    request = Request(compared.prompts, compared.max_new_tokens, modes=(mode,), **asked)
    own, _ = read_weights(compared.checkpoint, describe_candidate(candidate.path, candidate.runtime))
    comparison = Comparison(compared.checkpoint, request, Notes(), compared.reference, own)
    (cell,) = comparison.cells(Here(candidate))
    assert comparison.unequal is not None, cell
    constants = graph_constants(candidate.path, compared.checkpoint.config)
    return find_cause(compared.checkpoint, own, Here(candidate), comparison.unequal, constants, seconds, Notes(), repro)
