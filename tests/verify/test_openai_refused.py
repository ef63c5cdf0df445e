"""Servers that fail, and ways of asking that cannot be right: each is one line that says where and what."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.errors import InputError
from refengine.tokenizer import load_tokenizer
from tests.verify.commands import verify
from tests.verify.fields import check_fields
from tests.verify.scripted_server import Reply, completing, judged, scripted_server, silent_server
from verify.candidates.openai_answers import row_of
from verify.candidates.openai_options import KEY_VARIABLE, ServerOptions
from verify.candidates.token_strings import TokenStrings
from verify.errors import NoVerdict
from verify.report.as_json import as_json

pytest.importorskip("urllib3")


@pytest.fixture(autouse=True)
def no_key(monkeypatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


BAD = {
    "500 for ever": (completing(Reply({"error": {"message": "out of memory"}}, 500)), ["refused: status 500, out of"]),
    "503 for ever": (
        completing(Reply(b"<h1>busy\n\x1b[2J</h1>", 503)),
        ["200, found status 503, <h1>busy ?[2J"],
    ),
    "a redirection": (completing(Reply(b"", 307, {"Location": "/v2"})), ["expected status 200, found status 307"]),
    "broken JSON": (completing(Reply(b'{"choices": [{')), ["expected JSON, found '{\"choices\": [{'"]),
    "no JSON object": (completing([]), ["expected a completion with one choice, found []"]),
    "no choice": (completing({"choices": []}), ["expected a completion with one choice"]),
    "text alone": (
        completing({"choices": [{"text": " and"}]}),
        ["found text alone (' and'): its tokens cannot"],
    ),
    "no token": (completing({"choices": [{"text": ""}]}), ["expected at least one new token, found none"]),
    "an id that is none": (completing({"choices": [{"token_ids": [1.5]}]}), ["token ids that are whole numbers"]),
    "logprobs that are none": (
        completing({"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": ["b"]}}]}),
        ["expected a completion with one choice", "could not convert"],
    ),
    "fewer logprobs than tokens": (
        completing({"choices": [{"token_ids": [1, 2], "logprobs": {"tokens": ["a"]}}]}),
        ["zip() argument 2 is longer"],
    ),
    "a string that is no token": (
        completing({"choices": [{"text": "xyzzy", "logprobs": {"tokens": ["xyzzy"]}}]}),
        ["first new token is given as 'xyzzy', which is not the string of one token"],
    ),
    "tokens left out": (
        completing({"choices": [{"logprobs": {"tokens": ["a"]}}], "usage": {"completion_tokens": 3}}),
        ["counts 3 new tokens and names 1"],
    ),
    "another tokenizer": (
        completing({"choices": [{"token_ids": [1]}], "usage": {"prompt_tokens": 99}}),
        ["tokens, the server counts 99: its tokenizer is another"],
    ),
    "another prompt": (
        completing({"choices": [{"token_ids": [1], "prompt_token_ids": [1, 2]}]}),
        ["the server says that it read other tokens than these"],
    ),
    "a connection closed half-way": (
        completing(Reply({"choices": []}, cut_off=5)),
        ["expected an answer, found none after 0 retries", "IncompleteRead"],
    ),
    "no list of models": (lambda path, body: Reply({"data": []}), ["expected a list of models", "give model=NAME"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_server_that_fails_is_no_verdict_with_one_line_that_says_where_and_what(compared, name):
    reply, words = BAD[name]
    with scripted_server(reply) as server:
        report = judged(compared, server.base_url)
    check_fields(json.loads(as_json(report)))
    reason = report.cells[0].reason
    assert report.exit_code == 3
    assert reason.startswith(f"{server.base_url}/")
    assert "\n" not in reason
    assert all(word in reason for word in words), reason


def test_a_server_that_is_silent_or_gone_is_no_verdict(compared):
    with silent_server() as base_url:
        reason = judged(compared, base_url, timeout=0.2).cells[0].reason
        assert reason.startswith(
            f"{base_url}/models: expected an answer, found none after 0 retries: it was silent for"
        )
        assert "0.2 seconds; raise timeout" in reason
    report = judged(compared, base_url)
    assert report.exit_code == 3
    assert "refused" in report.cells[0].reason
    assert report.candidate.exporter == "a server that did not answer as expected"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            completing(Reply({"error": {"message": "no model tiny"}}, 404)),
            ["no such path or no such model", "no model t"],
        ),
        (
            completing(Reply({"message": "bad key Sesame"}, 401)),
            ["expected to be let in", "bad key ***", "give api_key"],
        ),
        (
            completing({"choices": [{"token_ids": [5, 384]}]}),
            ["row 0: token_ids: expected token ids from 0 to 383, found 384", "not the model's"],
        ),
        (
            completing({"choices": [{"token_ids": [10**30]}]}),
            ["row 0: token_ids: expected token ids", "not the model's"],
        ),
    ],
)
def test_a_server_of_something_else_is_bad_input(compared, reply, words):
    with scripted_server(reply) as server, pytest.raises(InputError) as refusal:
        judged(compared, server.base_url, api_key="Sesame")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(server.base_url)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["expected --provider-option base_url=http://HOST:PORT/v1, found none"]),
        ({"base_url": "127.0.0.1:8000"}, ["base_url: expected http://HOST:PORT/v1", "found '127.0.0.1:8000'"]),
        ({"base_url": "http://host:port/v1"}, ["base_url: expected"]),
        ({"base_url": "ftp://host/v1"}, ["base_url: expected"]),
        ({"base_url": "http://me:secret@host/v1"}, ["a user name or password in it"]),
        ({"base_url": "http://host/v1", "modle": "x"}, ["modle: not known to openai; known are base_url, model,"]),
        ({"base_url": "http://host/v1", "timeout": "0"}, ["timeout: expected a number from 0.001, found '0'"]),
        ({"base_url": "http://host/v1", "timeout": "nan"}, ["timeout: expected a number"]),
        ({"base_url": "http://host/v1", "retries": "1.5"}, ["retries: expected a whole number from 0, found '1.5'"]),
        ({"base_url": "http://host/v1", "max_requests": "0"}, ["max_requests: expected a whole number from 1"]),
        ({"base_url": "http://host/v1", "api_key": "a\nb"}, ["api_key: expected printable ASCII"]),
    ],
)
def test_options_that_cannot_be_right_are_refused_in_one_line(options, words):
    with pytest.raises(InputError) as refusal:
        ServerOptions.of(options)
    assert "\n" not in str(refusal.value)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--runtime", "ort-cpu"], "--runtime openai: a server is judged alone"),
        (["--batch-size", "4", "--cache", "on"], "--cache, --batch-size: a server decodes as it does"),
        (["--expect", "auto"], "--expect auto: a record does not say how it was made"),
        ([], "--runtime openai: expected --provider-option base_url=http://HOST:PORT/v1, found none"),
    ],
)
def test_what_a_server_cannot_be_asked_is_refused_in_one_line(compared, options, says):
    done = verify("compare", compared.checkpoint.path, "--runtime", "openai", *options)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"verify: {says}")


def test_a_server_that_is_not_there_gives_3_and_a_report(compared, tmp_path):
    with silent_server() as base_url:
        pass
    gone = ("--provider-option", f"base_url={base_url}", "--provider-option", "retries=0")
    done = verify("compare", compared.checkpoint.path, "--runtime", "openai", *gone, "--json", tmp_path / "report.json")
    assert done.code == 3
    assert done.first_lines[0] == "no-verdict: the candidate could not be run to the end, on openai"
    check_fields(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def strings(tiny) -> TokenStrings:
    return TokenStrings(lambda: load_tokenizer(tiny.path), tiny.config.vocab_size)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "token_id:5", "token_id:x", "the"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["the", "token_id:7"]), inner),
    max_leaves=5,
)
NAMES = ("text", "token_ids", "finish_reason", "logprobs")
OF_LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "content")
STEP = st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "token", "logprob", "top_logprobs"), ANYTHING))
LOGPROBS = st.fixed_dictionaries({}, optional={name: ANYTHING | st.lists(STEP) for name in OF_LOGPROBS})
CHOICE = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, ANYTHING | LOGPROBS))
USAGE = st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), ANYTHING)


@given(
    ANYTHING | st.fixed_dictionaries({"choices": st.lists(ANYTHING | CHOICE, max_size=2)}, optional={"usage": USAGE})
)
def test_whatever_a_server_answers_is_read_or_refused_in_one_line(strings, answer: Any):
    row, refusal = None, "here: "
    try:
        row = row_of("here", answer, [5], 4, strings)
    except NoVerdict as error:
        refusal = str(error)
    assert refusal.startswith("here: ")
    assert "\n" not in refusal
    if row is not None:
        assert 1 <= len(row.tokens) <= 4
        assert all(isinstance(token, int) for token in row.tokens)
        assert row.logprobs is None or len(row.logprobs) == len(row.tokens)
        assert all(isinstance(value, float) for step in row.logprobs or () for _, value in step)
