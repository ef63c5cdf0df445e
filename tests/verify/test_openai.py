"""Servers asked over HTTP: what they answer is judged as the record of another system is."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from refengine.errors import InputError
from refengine.model import forward
from refengine.tokenizer import load_tokenizer
from refengine.weights import Weights
from tests.verify.commands import table_of, verify
from tests.verify.fields import check_fields
from tests.verify.scripted_server import MODELS, NEW, Answers, Reply, completing, judged, scripted_server
from verify.candidates.openai_options import KEY_VARIABLE
from verify.report.as_json import as_json
from verify.truth.follow import log_softmax

pytest.importorskip("urllib3")


@pytest.fixture(autouse=True)
def no_key(monkeypatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def rows(compared) -> list[tuple[list[int], list[int], np.ndarray]]:
    """Prompts, what the model decodes after each, and the log-probabilities of that, in float32."""
    weights = Weights.open(compared.checkpoint)
    found = []
    for prompt, new in zip(compared.prompts, compared.reference.tokens, strict=True):
        tokens = [int(token) for token in new[:NEW]]
        row_1T = np.array([[*prompt, *tokens[:-1]]])
        logits_TV = forward(weights, row_1T, np.arange(row_1T.shape[1])[None])[0]
        found.append((prompt, tokens, log_softmax(logits_TV[-NEW:])))
    return found


@pytest.fixture(scope="module")
def right(rows) -> Answers:
    """A server that decodes as the model does, and names tokens by their ids, as vLLM does."""

    def reply(path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return MODELS
        _, tokens, logprobs_TV = next(row for row in rows if row[0] == body["prompt"])
        answer = completion(body, tokens, logprobs_TV, lambda token: f"token_id:{token}")
        answer["choices"][0]["token_ids"] = list(tokens)
        return Reply(answer)

    return reply


def completion(
    body: Mapping[str, Any], tokens: Sequence[int], logprobs_TV: np.ndarray, name: Callable[[int], str]
) -> dict[str, Any]:
    """An answer in OpenAI's shape, where tokens are called as `name` has it."""
    tops = [np.argsort(-logprobs_V)[: body["logprobs"]] for logprobs_V in logprobs_TV]
    logprobs = {
        "tokens": [name(token) for token in tokens],
        "token_logprobs": [float(x_V[token]) for x_V, token in zip(logprobs_TV, tokens, strict=True)],
        "top_logprobs": [
            {name(token): float(x_V[token]) for token in top} for x_V, top in zip(logprobs_TV, tops, strict=True)
        ],
    }
    text = "".join(logprobs["tokens"])
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens)}
    return {"choices": [{"text": text, "logprobs": logprobs, "finish_reason": "length"}], "usage": usage}


def changed(right: Answers, change: Callable[[Any], Any]) -> Answers:
    """The right server, with what it completes changed."""

    def reply(path: str, body: Any) -> Reply:
        said = right(path, body)
        return said if said is MODELS else Reply(change(said.content))

    return reply


def test_a_server_that_decodes_as_the_model_is_equal_in_tokens_and_logprobs(compared, right):
    with scripted_server(right) as server:
        report = judged(compared, server.base_url, retries=1)
    check_fields(json.loads(as_json(report)))
    (cell,) = report.cells
    assert (cell.verdict, cell.runtime, cell.cache, cell.batch_size) == ("equal", "openai", "unknown", None)
    assert (cell.tokens.compared, cell.logprobs.compared) == (3 * NEW, 3 * NEW * 5)
    assert 0 < cell.noise_ratio.logits <= cell.noise_ratio.bound
    assert cell.settings["effective"] | {"server": ""} == {
        "model": "tiny", "server": "", "prompts": "token ids", "requests": 4, "retries": 0
    }  # fmt: skip
    assert report.candidate.path == server.base_url
    assert report.candidate.exporter.startswith("tiny by BaseHTTP")
    assert "4 requests, 0 of them retries, for one prompt at a time" in report.notes[0]
    assert report.not_revealed[-1].startswith("logits: a server does not show them; logprobs of at most 5 tokens")


def test_it_is_asked_for_the_greedy_choice_and_to_go_on_after_end_tokens(compared, right):
    with scripted_server(right) as server:
        judged(compared, server.base_url, model="other", logprobs=2, api_key="a key")
    asked = server.bodies[0]
    assert (asked["model"], asked["prompt"], asked["max_tokens"]) == ("other", compared.prompts[0], NEW)
    assert (asked["temperature"], asked["logprobs"], asked["ignore_eos"]) == (0, 2, True)
    assert (asked["repeat_penalty"], asked["repetition_penalty"]) == (1, 1)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer a key"}


def test_another_token_is_a_mismatch_and_other_logprobs_are_drift(compared, right):
    def other_token(answer: Any) -> Any:
        answer["choices"][0]["token_ids"][1] = 9
        return answer

    def other_logprobs(answer: Any) -> Any:
        for top in answer["choices"][0]["logprobs"]["top_logprobs"]:
            top.update({name: value + 0.01 for name, value in top.items()})
        return answer

    for change, verdict in ((other_token, "mismatch"), (other_logprobs, "drift")):
        with scripted_server(changed(right, change)) as server:
            assert judged(compared, server.base_url).verdict == verdict


def test_the_spelling_of_llama_cpps_own_server_is_read(compared, right):
    """`logprobs.content`, with the id of each token."""

    def respelt(answer: Any) -> Any:
        choice = answer["choices"][0]
        classic, ids = choice["logprobs"], choice.pop("token_ids")
        choice["logprobs"] = {
            "content": [
                {
                    "id": token,
                    "token": "?",
                    "logprob": own,
                    "top_logprobs": [{"id": int(name[9:]), "token": "?", "logprob": top[name]} for name in top],
                }
                for token, own, top in zip(ids, classic["token_logprobs"], classic["top_logprobs"], strict=True)
            ]
        }
        return answer

    with scripted_server(changed(right, respelt)) as server:
        (cell,) = judged(compared, server.base_url).cells
    assert (cell.verdict, cell.logprobs.compared) == ("equal", 3 * NEW * 5)


def test_a_server_that_takes_nothing_but_the_standard_is_asked_so_once_it_has_refused(compared, right):
    def strict(path: str, body: Any) -> Reply:
        if body and "ignore_eos" in body:
            return Reply({"error": {"message": "Unrecognized request argument: ignore_eos"}}, 400)
        return right(path, body)

    with scripted_server(strict) as server:
        report = judged(compared, server.base_url)
    assert report.verdict == "equal"
    assert ["ignore_eos" in body for body in server.bodies if body] == [True, True, False, False, False]
    assert report.cells[0].settings["effective"]["requests"] == 6


def test_a_server_without_logprobs_is_judged_on_its_tokens_alone_and_the_report_says_so(compared, right):
    def without(answer: Any) -> Any:
        answer["choices"][0]["logprobs"] = None
        return answer

    with scripted_server(changed(right, without)) as server:
        report = judged(compared, server.base_url)
    (cell,) = report.cells
    assert (cell.verdict, cell.noise_ratio, cell.logprobs) == ("equal", None, None)
    assert any(line.startswith("drift: the trace holds neither logits nor logprobs") for line in report.not_revealed)
    with scripted_server(changed(right, without)) as server:
        judged(compared, server.base_url, logprobs=0)
    assert all("logprobs" not in body for body in server.bodies if body)


def test_rows_may_end_early_and_the_report_says_how_many(compared, right):
    def short(answer: Any) -> Any:
        choice = answer["choices"][0]
        choice["token_ids"] = choice["token_ids"][:2]
        choice["logprobs"] = {name: values[:2] for name, values in choice["logprobs"].items()}
        return answer

    with scripted_server(changed(right, short)) as server:
        report = judged(compared, server.base_url)
    assert (report.verdict, report.cells[0].tokens.compared) == ("equal", 6)
    assert f"openai: 3 of 3 rows ended before {NEW} new tokens" in report.notes


def busy(right: Answers, times: int, status: int = 429) -> Answers:
    """The right server, once it has refused so many times."""
    refusals = iter([Reply({"error": {"message": "slow down"}}, status, {"Retry-After": "0"})] * times)
    return lambda path, body: next(refusals, None) or right(path, body)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_and_that_is_counted(compared, right, status):
    with scripted_server(busy(right, 1, status)) as server:
        report = judged(compared, server.base_url, retries=1)
    assert report.verdict == "equal"
    effective = report.cells[0].settings["effective"]
    assert (effective["requests"], effective["retries"]) == (5, 1) == (len(server.bodies), 1)


def test_the_bound_on_requests_holds_for_retries_too(compared, right):
    with scripted_server(busy(right, 2)) as server:
        report = judged(compared, server.base_url, retries=9, max_requests=4)
    assert report.verdict == "no-verdict"
    assert len(server.bodies) == 4
    assert "all 4 of max_requests are sent; raise it" in report.cells[0].reason


def only_text(right: Answers, compared, rows, name: Callable[[int], str]) -> Any:
    """A server that takes text alone, and names tokens by their strings."""
    tokenizer = load_tokenizer(compared.checkpoint.path)

    def reply(path: str, body: Any) -> Reply:
        if body is not None and not isinstance(body["prompt"], str):
            return Reply({"detail": "Input should be a valid string"}, 422)
        if body is None:
            return right(path, body)
        ids = tokenizer(body["prompt"])["input_ids"]
        _, tokens, logprobs_TV = next(row for row in rows if row[0] == ids)
        return Reply(completion(body | {"prompt": ids}, tokens, logprobs_TV, name))

    return reply


def test_strings_are_mapped_to_ids_and_what_follows_one_that_is_no_single_tokens_is_left_out(compared, right, rows):
    tokenizer = load_tokenizer(compared.checkpoint.path)
    with scripted_server(only_text(right, compared, rows, lambda token: tokenizer.decode([token]))) as server:
        report = judged(compared, server.base_url)
    assert (report.verdict, report.cells[0].tokens.compared) == ("equal", 3 * NEW)
    assert report.cells[0].settings["effective"]["prompts"] == "text"
    assert "the server takes no token ids, so prompts were sent as text" in report.notes[1]
    third = rows[0][1][2]
    unlike = only_text(right, compared, rows, lambda token: "\ufffd" if token == third else tokenizer.decode([token]))
    with scripted_server(unlike) as server:
        report = judged(compared, server.base_url)
    assert report.verdict == "equal"
    assert any("judged up to the first that no one token has, the first of them row 0" in note for note in report.notes)


def test_more_prompts_than_requests_are_refused_before_one_is_sent(compared, right):
    with (
        scripted_server(right) as server,
        pytest.raises(InputError, match="3 prompts need 4 requests, found 3; raise it, or give fewer prompts"),
    ):
        judged(compared, server.base_url, max_requests=3)
    assert server.bodies == []


def test_the_key_is_nowhere_in_a_report(compared, right, monkeypatch):
    said = {"error": {"message": "Sesame is out"}}
    for reply in (right, completing(Reply(said, 400)), completing(said), lambda path, body: Reply(said)):
        with scripted_server(reply) as server:
            assert "Sesame" not in repr(judged(compared, server.base_url, api_key="Sesame"))
        monkeypatch.setenv(KEY_VARIABLE, "Sesame")
        with scripted_server(reply) as server:
            assert "Sesame" not in repr(judged(compared, server.base_url))
        assert server.headers[-1]["Authorization"] == "Bearer Sesame"


def test_the_command_line_judges_a_server_and_its_report_says_how(compared, right, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in compared.prompts))
    with scripted_server(right) as server:
        asked = ("--runtime", "openai", "--provider-option", f"base_url={server.base_url}", "--prompts", prompts)
        done = verify("compare", compared.checkpoint.path, *asked, "--max-new-tokens", NEW)
    assert (done.code, done.err) == (0, "")
    assert done.first_lines[0] == (
        "equal: all 12 tokens of 1 run are the checkpoint's, and the logprobs are honest float32"
    )
    shown = " ".join(done.out.split())
    assert f"candidate {server.base_url} (tiny by BaseHTTP" in shown
    assert "sha256 )" not in shown
    assert "3, at most 4 new tokens each" in shown
    assert table_of(done.out.splitlines())[1].split()[:4] == ["openai", "unknown", "equal", "12/12"]
    assert "note: openai: 4 requests, 0 of them retries" in done.out
    assert "not revealed: logits: a server does not show them" in done.out
