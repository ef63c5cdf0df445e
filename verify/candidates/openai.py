"""Any OpenAI-compatible server: asked over HTTP to complete prompts, one after the other.

It shows no logits and cannot be fed what another chose, so it is no `Candidate`: what it answers becomes a trace, to be
judged as any other system's record.

Source: OpenAI's API reference, "Completions" (legacy); what vLLM 0.11, llama.cpp's server and llama-cpp-python 0.3.36
take and give beyond it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from refengine.errors import InputError
from verify.candidates.openai_answers import Row, row_of
from verify.candidates.openai_options import KEY_VARIABLE, ServerOptions
from verify.candidates.token_strings import TokenStrings
from verify.errors import NoVerdict, RuntimeMissing
from verify.trace_file import Rows, Trace

INSTALL = 'pip install "tokenproof[openai]"'
# Beyond the standard, for who knows them: plain greedy choice (some servers penalise what repeats unless told not to),
# going on after an end token, and token ids in place of their strings.
EXTRAS: Mapping[str, Any] = {
    "repeat_penalty": 1.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
AGAIN = (408, 429, 502, 503, 504)  # a server that is busy or not ready yet; what it cannot do it refuses as 500 too
REFUSED = (400, 413, 415, 422, 500, 501)
BACKOFF = 0.5  # seconds before the second retry, doubled for each after it
LONGEST = 200  # characters of a server's own words


@dataclass(frozen=True)
class Served:
    """What a server decoded.

    Attributes:
        trace: a row for each prompt.
        model: as the server calls it.
        server: as it names itself; empty where it does not.
        requests: that were sent, retries included.
        retries: how many of them were one.
        as_text: the prompts were sent as text, since the server takes no token ids.
        cut: rows and steps from which on tokens have no id, and are not in the trace.
    """

    trace: Trace
    model: str
    server: str
    requests: int
    retries: int
    as_text: bool
    cut: tuple[tuple[int, int], ...]


def complete(
    options: ServerOptions,
    prompts: Rows,
    max_new_tokens: int,
    strings: TokenStrings,
    on_row: Callable[[], None] = lambda: None,
) -> Served:
    """Has a server decode greedily after each prompt.

    Args:
        prompts: token ids.
        strings: of the checkpoint's tokenizer, for a server that takes or gives no token ids.
        on_row: called after each of them.

    Raises:
        InputError: the options cannot be right, or the server says so: no such model, path or key.
        RuntimeMissing: urllib3 is not installed.
        NoVerdict: the server fails, or does not say which tokens it chose.
    """
    needed = len(prompts) + (options.model is None)
    if needed > options.max_requests:
        raise InputError(
            f"max_requests: {len(prompts)} prompts need {needed} requests, found {options.max_requests}; "
            "raise it, or give fewer prompts"
        )
    rows = []
    with closing(_Client(options)) as client:
        model = options.model or _first_model(client)
        asker = _Asker(client, model, max_new_tokens, strings)
        for number, prompt in enumerate(prompts, start=1):
            rows.append(asker.row(f"{client.url('completions')}: prompt {number}", prompt))
            on_row()
    logprobs = [row.logprobs for row in rows if row.logprobs is not None]
    whole = logprobs if len(logprobs) == len(rows) else None
    return Served(
        Trace(prompts, [row.tokens for row in rows], logprobs=whole),
        _printable(model),
        _printable(client.server),
        client.requests,
        client.retries,
        as_text=not asker.ways[0][0],
        cut=tuple((place, len(row.tokens)) for place, row in enumerate(rows) if row.is_cut),
    )


class _Asker:
    """One model, asked in the first way that its server takes: prompts as token ids or as text, extras or none."""

    def __init__(self, client: "_Client", model: str, max_new_tokens: int, strings: TokenStrings):
        self.client = client
        self.strings = strings
        self.most = max_new_tokens
        self.asked: dict[str, Any] = {"model": model, "max_tokens": max_new_tokens, "temperature": 0}
        if client.options.logprobs:
            self.asked["logprobs"] = client.options.logprobs
        self.ways: Sequence[tuple[bool, bool]] = [(True, True), (False, True), (True, False), (False, False)]

    def row(self, where: str, prompt: Sequence[int]) -> Row:
        refusals: dict[str, None] = {}  # in the order in which they came, each once
        for ids, extras in self.ways:
            try:
                given = list(prompt) if ids else self.strings.text_of(prompt)
            except InputError as error:
                refusals[str(error)] = None
                continue
            body = {**self.asked, "prompt": given, **(EXTRAS if extras else {})}
            answer, refusal = self.client.send("POST", "completions", body)
            if not refusal:
                self.ways = [(ids, extras)]
                try:
                    return row_of(where, answer, prompt, self.most, self.strings)
                except NoVerdict as error:
                    raise NoVerdict(self.client.without_key(str(error))) from error
            refusals[refusal] = None
        raise NoVerdict(f"{where}: expected a completion, the server refused: {'; '.join(refusals)}")


class _Client:
    """Sends requests, and again where that may help; counts them all."""

    def __init__(self, options: ServerOptions):
        try:
            import urllib3
        except ImportError as error:
            raise RuntimeMissing(f"openai: urllib3 cannot be imported ({error}): {INSTALL}") from error
        self.options = options
        self.requests = self.retries = 0
        self.server = ""
        self._urllib3 = urllib3
        key = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
        self._pool = urllib3.PoolManager(timeout=urllib3.Timeout(options.timeout), headers=key)

    def close(self) -> None:
        self._pool.clear()

    def url(self, path: str) -> str:
        return f"{self.options.base_url}/{path}"

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[Any, str]:
        """The answer, or None and why the server refuses what it was asked."""
        url, left = self.url(path), self.options.max_requests - self.requests
        if left < 1:
            raise NoVerdict(f"{url}: all {self.options.max_requests} of max_requests are sent; raise it")
        retry = self._urllib3.Retry(
            min(self.options.retries, left - 1),
            status_forcelist=AGAIN,
            allowed_methods=None,
            backoff_factor=BACKOFF,
            retry_after_max=math.ceil(self.options.timeout),
            raise_on_status=False,
        )
        errors = self._urllib3.exceptions
        try:
            # Sent to no other address than the one given, since a key goes with it.
            response = self._pool.request(method, url, json=body, retries=retry, redirect=False)
        except errors.HTTPError as error:
            reason, again = (error.reason, retry.total) if isinstance(error, errors.MaxRetryError) else (error, 0)
            words = self._words(str(reason).partition("): ")[2] or str(reason))
            if isinstance(reason, errors.TimeoutError) and not isinstance(reason, errors.NewConnectionError):
                words = f"it was silent for {self.options.timeout:g} seconds; raise timeout if it may take longer"
            raise NoVerdict(f"{url}: expected an answer, found none after {again} retries: {words}") from error
        self.server = response.headers.get("server", self.server)
        again = len(response.retries.history) if response.retries else 0
        self.retries += again
        self.requests += 1 + again
        return self._answer(url, response.status, response.data.decode("utf-8", "replace"))

    def _answer(self, url: str, status: int, text: str) -> tuple[Any, str]:
        said = f"status {status}, {self._words(_message(text)) or 'no words'}"
        if status in (401, 403):
            raise InputError(f"{url}: expected to be let in, found {said}; give api_key, or set {KEY_VARIABLE}")
        if status == 404:
            raise InputError(f"{url}: no such path or no such model: {said}; base_url usually ends in /v1")
        if status in REFUSED:
            return None, said
        if status != 200:
            raise NoVerdict(f"{url}: expected status 200, found {said}")
        try:
            return json.loads(text), ""
        except (ValueError, RecursionError) as error:
            raise NoVerdict(f"{url}: expected JSON, found {self._words(text)[:80]!r} ({error})") from error

    def _words(self, text: str) -> str:
        """A server's words on one line of printable characters."""
        line = self.without_key(_printable(" ".join(text.split())))
        return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."

    def without_key(self, text: str) -> str:
        """A text without the key, should a server have repeated that."""
        return text.replace(self.options.api_key, "***") if self.options.api_key else text


def _first_model(client: _Client) -> str:
    answer, refusal = client.send("GET", "models")
    listed = answer.get("data") if isinstance(answer, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else None
    name = first.get("id") if isinstance(first, dict) else None
    if not isinstance(name, str):
        found = refusal or client.without_key(f"{json.dumps(answer):.80}")
        raise NoVerdict(f"{client.url('models')}: expected a list of models, found {found}; give model=NAME")
    return name


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _message(text: str) -> str:
    """What an error says: `error.message` as OpenAI has it, `message` or `detail` as others do, or all of it."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text
    said = said.get("error", said) if isinstance(said, dict) else said
    words = (said.get("message") or said.get("detail")) if isinstance(said, dict) else said
    return words if isinstance(words, str) else text
