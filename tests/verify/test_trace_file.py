"""Traces as files: whatever is one is read as it was written, and whatever is none is refused in one line."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.errors import InputError
from tests.verify.commands import verify
from tests.verify.test_cli_refused import assert_refused
from tests.verify.traces import write_trace
from verify.trace_file import Trace, read_trace

TOKENS = Trace([[40, 41], [42]], [[7, 8], [9]])
LOGITS = Trace(TOKENS.prompts, TOKENS.tokens, logits=[np.zeros((2, 384)), np.zeros((1, 384))])


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2**40), min_size=1), st.lists(st.integers(0, 2**40), min_size=1, max_size=6)),
    min_size=1,
    max_size=12,
)
PAIRS = st.lists(st.tuples(st.integers(0, 2**40), st.floats(allow_nan=False, allow_infinity=False)), min_size=1)


@given(ROWS, st.data())
def test_every_trace_in_lines_is_read_as_it_was_written(tmp_path_factory, rows, data):
    prompts, tokens = map(list, zip(*rows, strict=True))
    logprobs = None
    if data.draw(st.booleans(), "with logprobs"):
        logprobs = [data.draw(st.lists(PAIRS, min_size=len(new), max_size=len(new))) for new in tokens]
    trace = Trace(prompts, tokens, logprobs=logprobs)
    assert read_trace(write_trace(trace, tmp_path_factory.getbasetemp() / "trace.jsonl")) == trace


@given(ROWS, st.sampled_from(["float16", "float32", "float64"]), st.integers(1, 9))
def test_every_trace_in_arrays_is_read_as_it_was_written(tmp_path_factory, rows, dtype, vocabulary):
    prompts, tokens = map(list, zip(*rows, strict=True))
    logits = [np.random.default_rng(0).standard_normal((len(new), vocabulary)).astype(dtype) for new in tokens]
    read = read_trace(write_trace(Trace(prompts, tokens, logits), tmp_path_factory.getbasetemp() / "trace.npz"))
    assert (read.prompts, read.tokens) == (prompts, tokens)
    for mine, theirs in zip(read.logits, logits, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_array_equal(mine, theirs)


@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"[", b'{"token_ids": ']))
def test_bytes_that_are_no_trace_are_refused_in_one_line(tmp_path_factory, content, beginning):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(beginning + content)
    with pytest.raises(InputError) as refusal:
        read_trace(path)
    assert str(refusal.value).startswith(str(path))


@given(st.integers(0), st.integers(0, 255))
def test_an_archive_that_was_damaged_is_refused_or_read(tmp_path_factory, place, value):
    path = write_trace(LOGITS, tmp_path_factory.getbasetemp() / "damaged.npz")
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        read_trace(path)


ROW = {"prompt_token_ids": [40, 41], "token_ids": [7, 8]}
NAN_LOGPROB = '{"prompt_token_ids": [40, 41], "token_ids": [7], "logprobs": [[[7, NaN]]]}'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], ["an empty trace", "expected JSON lines with"]),
        (["Today is a good day"], ["trace:1: not JSON", "expected JSON lines with"]),
        ([ROW, [40, 41]], ["trace:2: no JSON object"]),
        ([{"prompt": [40], "tokens": [7]}], ["trace:1: prompt_token_ids: expected a list", "found null"]),
        ([ROW, "", ROW | {"token_ids": []}], ["trace:3: token_ids: expected a list of at least one whole number"]),
        ([ROW | {"token_ids": [7, True]}], ["token_ids: expected", "found [7, true]"]),
        (
            [ROW | {"token_ids": [7, 384]}],
            ["row 0: token_ids: expected token ids from 0 to 383, found 384"],
        ),
        (
            [ROW, ROW | {"prompt_token_ids": [10**30]}],
            ["row 1: prompt_token_ids: expected", "a trace whose tokens are not the model's"],
        ),
        ([ROW | {"prompt_token_ids": [4] * 512}], ["row 0: 512 prompt tokens and 2 new ones exceed", "512"]),
        ([ROW | {"logprobs": [[[7, -1.0]]]}], ["logprobs: expected a list for each of the 2 token_ids, found 1"]),
        ([ROW | {"logprobs": {"7": -1.0}}], ["logprobs: expected a list for each of the 2 token_ids"]),
        ([ROW | {"logprobs": [[[7, -1.0]], []]}], ["logprobs of step 1: expected at least one", "found []"]),
        ([ROW | {"logprobs": [[[7, -1.0]], [["a", -1.0]]]}], ["logprobs of step 1: expected at least one [token id,"]),
        ([ROW | {"logprobs": [[[7, -1.0]], [[-1, -1.0]]]}], ["logprobs: expected token ids from 0 to 383, found -1"]),
        ([NAN_LOGPROB], ["logprobs of step 0: expected", "finite number", "found [[7, NaN]]"]),
        (
            [ROW | {"logprobs": [[[7, -1]], [[8, -(10**400)]]]}, ROW],
            ["in every row or in none, found none in this one"],
        ),
    ],
)
def test_lines_that_are_no_trace_of_the_model_are_refused_in_one_line(tiny, tmp_path, lines, words):
    path = tmp_path / "trace"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    assert_refused(verify("check", tiny.path, path, "--json", tmp_path / "report.json"), *words)
    assert list(tmp_path.iterdir()) == [path]


ARRAYS = {"prompt_token_ids_0": np.array([40, 41]), "token_ids_0": np.array([7, 8]), "logits_0": np.zeros((2, 384))}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, ["trace.npz: no trace; expected JSON lines", "or an .npz file with prompt_token_ids_0"]),
        ({"token_ids_0": None}, ["token_ids_0 is missing"]),
        ({"prompt_token_ids_0": None}, ["logits of every row, numbered from 0; prompt_token_ids_0 is missing"]),
        ({"prompt_token_ids_2": np.array([4])}, ["prompt_token_ids_1 is missing"]),
        ({"logits_1": np.zeros((2, 384))}, ["prompt_token_ids_1 is missing"]),
        ({"token_ids_0": np.array([7.0, 8.0])}, ["token_ids_0: expected one axis", "found float64 (2,)"]),
        ({"token_ids_0": np.array([[7, 8]])}, ["token_ids_0: expected one axis", "found int64 (1, 2)"]),
        ({"token_ids_0": np.array([7, 8], object)}, ["not a whole .npz file", "allow_pickle"]),
        ({"logits_0": np.zeros((3, 384))}, ["logits_0: expected floating point of shape (2, vocabulary)", "(3, 384)"]),
        ({"logits_0": np.zeros((2, 384), int)}, ["logits_0: expected floating point", "found int64 (2, 384)"]),
        ({"logits_0": np.zeros((2, 400))}, ["row 0: logits: expected 384 a step", "found 400", "not the model's"]),
    ],
)
def test_arrays_that_are_no_trace_of_the_model_are_refused_in_one_line(tiny, tmp_path, arrays, words):
    given = {name: array for name, array in (ARRAYS | arrays).items() if array is not None} if arrays else {}
    np.savez(tmp_path / "trace.npz", **given)
    assert_refused(verify("check", tiny.path, tmp_path / "trace.npz"), *words)


def test_files_and_options_that_cannot_be_used_are_one_line(tiny, tmp_path):
    trace = write_trace(TOKENS, tmp_path / "trace.jsonl")
    assert_refused(verify("check", tiny.path, tmp_path / "gone"), "gone: the trace could not be read", "No such file")
    assert_refused(verify("check", tiny.path, tmp_path), "the trace could not be read", "directory")
    assert_refused(verify("check", tiny.path, tiny.path / "model.safetensors"), "model.safetensors: no trace; expected")
    assert_refused(verify("check", tmp_path / "gone", trace), "gone: no such file or directory")
    done = verify("check", tiny.path, trace, "--expect", "auto")  # no runtime that says what it does
    assert (done.code, "--expect auto: a record does not say how it was made" in done.err) == (2, True)
    assert_refused(verify("check", tiny.path, trace, "--json", tmp_path / "no" / "report.json"), "no such directory")
    whole = write_trace(LOGITS, tmp_path / "trace.npz").read_bytes()
    (tmp_path / "trace.npz").write_bytes(whole[:-40])
    assert_refused(verify("check", tiny.path, tmp_path / "trace.npz"), "trace.npz: not a whole .npz file")
