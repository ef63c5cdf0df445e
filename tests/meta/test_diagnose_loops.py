"""What loops with a mistake decode from a right export on ONNX Runtime is named from its record."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnxruntime
import pytest

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.meta.loops import Loop
from tests.verify.commands import verify
from tests.verify.conftest import TEXTS, TINY_LLAMA
from tests.verify.traces import write_trace
from verify.check import judge_trace
from verify.diagnose_trace import diagnose_trace
from verify.expect import EXACT
from verify.export import export_decoder
from verify.report.diagnosis import cause_in_words
from verify.report.result import Diagnosis
from verify.trace_file import Trace

NEW, LONGEST = 12, 16
CHECKPOINT = open_checkpoint(TINY_LLAMA)
BOS = CHECKPOINT.config.bos_token_id
LOOPS = {
    "mask-length": Loop(mask="new, behind"),
    "position-offset": Loop(positions="0"),
    "cache-not-reset": Loop(resets=False),
    "bos-missing": Loop(bos=-1),
    "bos-doubled": Loop(bos=BOS),
    "repetition-penalty": Loop(penalty=1.2),
}


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> onnxruntime.InferenceSession:
    path = tmp_path_factory.mktemp("loops") / "model.onnx"
    export_decoder(CHECKPOINT, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(TINY_LLAMA)
    return [[BOS, *encode_prompt(tokenizer, text, chat=False)][:LONGEST] for text in TEXTS[1:]]


def diagnosed(trace: Trace, checkpoint: Checkpoint = CHECKPOINT) -> Diagnosis | None:
    cell = judge_trace(checkpoint, trace, EXACT)
    return diagnose_trace(checkpoint, trace, cell, partial(judge_trace, checkpoint, expectation=EXACT), seconds=300)


def named(found: Diagnosis | None) -> list[str]:
    assert found is not None
    return [found.status, *(cause.name for cause in found.causes if cause.status != "ruled-out")]


def test_a_right_loop_has_nothing_to_explain(session, prompts):
    assert diagnosed(Loop().trace(session, prompts, NEW)) is None


@pytest.mark.parametrize("name", LOOPS)
def test_the_mistake_of_a_loop_is_named_by_what_is_recorded(session, prompts, name):
    found = diagnosed(LOOPS[name].trace(session, prompts, NEW))
    assert named(found) == ["named", name]
    assert found.causes[0].fix


def test_the_mistake_of_a_loop_is_named_by_its_tokens_alone(session, prompts):
    trace = replace(LOOPS["mask-length"].trace(session, prompts, NEW), logits=None)
    assert named(diagnosed(trace)) == ["named", "mask-length"]


@pytest.fixture
def with_end(session, prompts, tmp_path) -> Path:
    """The model, of which a token that it decodes is an end token."""
    (tokens,) = Loop().trace(session, prompts[:1], NEW).tokens
    made = tmp_path / "model"
    made.mkdir()
    for file in TINY_LLAMA.iterdir():
        if file.name != "generation_config.json":
            (made / file.name).symlink_to(file)
    text = (TINY_LLAMA / "config.json").read_text()
    (made / "config.json").unlink()
    (made / "config.json").write_text(json.dumps(json.loads(text) | {"eos_token_id": [tokens[4]]}))
    return made


def test_an_ignored_end_token_is_named_though_every_token_is_right(session, prompts, with_end, tmp_path):
    checkpoint = open_checkpoint(with_end)
    ends = checkpoint.config.eos_token_id
    assert diagnosed(Loop(ends=ends).trace(session, prompts[:1], NEW), checkpoint) is None
    trace = Loop().trace(session, prompts[:1], NEW)
    assert named(diagnosed(trace, checkpoint)) == ["named", "eos-ignored"]
    done = verify("check", with_end, write_trace(trace, tmp_path / "trace.npz"))
    assert (done.code, done.first_lines[0].split(":")[0]) == (0, "equal")
    assert done.first_lines[1].startswith(f"cause: eos-ignored (ids [{ends[0]}])")
    assert "eos_token_id" in done.out or "stop at each" in done.out.lower()


def test_end_tokens_that_are_ignored_are_no_explanation_of_something_else(session, prompts, with_end):
    """The model itself is wrong: its weights are others than those of the reference."""
    trace = Loop().trace(session, prompts[:1], NEW)
    other = replace(trace, logits=[2 * logits_TV for logits_TV in trace.logits])
    found = diagnosed(other, open_checkpoint(with_end))
    assert named(found) == ["unexplained", "eos-ignored"]
    assert cause_in_words(found).startswith("not known")
    assert any("end tokens were ignored" in note for note in found.notes)
