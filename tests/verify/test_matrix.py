"""One table of verdicts: what every exporter wrote, on every runtime that opens it, with its cache and without.

Each export is held against the checkpoint in float32, and against what its weights and its runtime's settings say of
themselves: an honest one is equal to that, whatever its precision.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from refengine.checkpoint import Checkpoint, open_checkpoint
from tests.verify.comparing import Here, Notes
from verify.candidates.files import describe_candidate
from verify.compare import Comparison
from verify.own_weights import read_weights
from verify.report.result import Cell
from verify.request import Request
from verify.runtimes import USUAL, runtime_named
from verify.truth.references import References

FIXTURES = Path(__file__).parents[2] / "fixtures"
ONNX = ("ort-cpu", "ort-openvino", "openvino")
LENGTHS, NEW_TOKENS = (21, 15), 4  # tokens of prompts, both longer than the window, and after them
DRIFT, MISMATCH, EQUAL = "drift", "mismatch", "equal"


@dataclass(frozen=True)
class Line:
    """An export, and what is said of it in float32 and by its own account, on these runtimes."""

    model: str
    export: str
    runtimes: tuple[str, ...]
    float32: tuple[str, ...]  # any of these: whether a token flips is for the prompts to say
    auto: str = EQUAL
    modes: tuple[str, ...] = ("off", "on")


def llama(export: str, runtimes: tuple[str, ...], *float32: str, **more) -> Line:
    return Line("tiny_llama", export, runtimes, float32, **more)


def mistral(export: str, runtimes: tuple[str, ...], *float32: str, **more) -> Line:
    return Line("tiny_mistral", export, runtimes, float32, **more)


ROUNDED = (DRIFT, MISMATCH)
# openvino computes in bfloat16 on a processor that has it, and in float32 on others.
NARROW = (EQUAL, DRIFT, MISMATCH)
TABLE = (
    llama("optimum", ("ort-cpu", "ort-openvino"), EQUAL),
    llama("optimum", ("openvino",), *NARROW),
    llama("optimum-no-past", ("ort-cpu", "ort-openvino"), EQUAL, modes=("off",)),
    llama("optimum-no-past", ("openvino",), *NARROW, modes=("off",)),
    llama("dynamo", ("ort-cpu", "ort-openvino"), EQUAL),
    llama("dynamo", ("openvino",), *NARROW),
    llama("genai", ("ort-cpu", "ort-openvino"), EQUAL),
    llama("genai-fp16", ("ort-cpu", "ort-openvino"), *ROUNDED),
    llama("genai-int4", ("ort-cpu", "ort-openvino"), *ROUNDED),
    llama("optimum-intel", ("openvino",), *NARROW),
    llama("optimum-intel-stateless", ("openvino",), *NARROW),
    llama("optimum-intel-int8", ("openvino",), *ROUNDED),
    mistral("mistral-community/onnx/model.onnx", ("ort-cpu", "ort-openvino"), EQUAL),
    mistral("mistral-community/onnx/model_fp16.onnx", ("ort-cpu", "ort-openvino"), *ROUNDED),
    mistral("mistral-community/onnx/model_q4.onnx", ("ort-cpu", "ort-openvino"), *ROUNDED),
    mistral("mistral-community/onnx/model_q4f16.onnx", ("ort-cpu",), *ROUNDED),
    mistral("mistral-community/onnx/model_bnb4.onnx", ("ort-cpu",), *ROUNDED),
    mistral("mistral-community/onnx/model_quantized.onnx", ("ort-cpu",), *ROUNDED),
    mistral("mistral-community/onnx/model_uint8.onnx", ("ort-openvino",), *ROUNDED),
    mistral("mistral-legacy", ("ort-cpu", "ort-openvino"), EQUAL),
    mistral("mistral-genai-window", ("ort-cpu", "ort-openvino"), EQUAL),
    # The model builder 0.18 leaves out the window of a Mistral whose config.json has no layer_types.
    mistral("mistral-genai", ("ort-cpu", "ort-openvino"), MISMATCH, auto=MISMATCH),
)
CASES = [pytest.param(line, runtime, id=f"{line.export}-{runtime}") for line in TABLE for runtime in line.runtimes]


@cache
def checkpoint(model: str) -> Checkpoint:
    return open_checkpoint(FIXTURES / model)


@cache
def prompts(model: str) -> tuple[tuple[int, ...], ...]:
    random = np.random.default_rng(7)
    vocab_size = checkpoint(model).config.vocab_size
    return tuple(tuple(random.integers(2, vocab_size, length).tolist()) for length in LENGTHS)


@cache
def exact_run(model: str):
    references = References(checkpoint(model), None, lambda what: None)
    asked = Request(prompts(model), NEW_TOKENS)
    return references.run(asked.expectation, asked.prompts, NEW_TOKENS, ())


def cells(line: Line, runtime: str) -> dict[str, dict[str, Cell]]:
    """By what it is held against, and by cache mode."""
    model, path = checkpoint(line.model), FIXTURES / "exports" / line.export
    file = describe_candidate(path)
    own, _ = read_weights(model, file)
    candidate = Here(runtime_named(runtime)(path, runtime, {}, model.config))
    found = {}
    for name, expectation in (("float32", Request.expectation), ("auto", None)):
        asked = replace(Request(prompts(line.model), NEW_TOKENS), expectation=expectation)
        comparison = Comparison(model, asked, Notes(), exact_run(line.model), own)
        found[name] = {cell.cache: cell for cell in comparison.cells(candidate)}
    return found


@pytest.mark.parametrize(("line", "runtime"), CASES)
def test_an_export_is_what_it_says_of_itself(line, runtime):
    found = cells(line, runtime)
    said = [(cell.expect, cell.verdict, cell.reason) for cell in found["auto"].values()]
    assert tuple(found["auto"]) == line.modes
    assert all(cell.verdict == line.auto for cell in found["auto"].values()), said
    assert all(cell.verdict in line.float32 for cell in found["float32"].values())
    for cell in found["float32"].values():
        explained = cell.verdict != EQUAL and line.auto == EQUAL
        assert (cell.explained_by is not None) == explained


def test_the_table_has_every_frozen_export():
    kept = {path.name for path in (FIXTURES / "exports").iterdir() if path.is_dir()}
    assert kept == {line.export.split("/")[0] for line in TABLE}
    assert set(USUAL) == {runtime for line in TABLE for runtime in line.runtimes}
