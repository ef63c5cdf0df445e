"""What OpenAI-compatible servers answer to a completion, read: token ids and log-probabilities in every spelling."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refengine.config_values import is_whole
from verify.candidates.token_strings import TokenStrings
from verify.errors import NoVerdict
from verify.trace_file import TopLogprobs

ID = "token_id:"  # before the number, in vLLM's strings for tokens
Name = int | str  # a token as a server names it


@dataclass(frozen=True)
class Row:
    """What came after one prompt.

    Attributes:
        tokens: at least one.
        logprobs: at each step; None where the server gives none.
        is_cut: more tokens came, after the first that has no id.
    """

    tokens: Sequence[int]
    logprobs: TopLogprobs | None
    is_cut: bool


@dataclass(frozen=True)
class _Step:
    """A token as a server names it, and log-probabilities by such names, its own among them."""

    name: Name
    logprobs: Mapping[Name, float]


def row_of(where: str, answer: Any, prompt: Sequence[int], most: int, strings: TokenStrings) -> Row:
    """Reads the answer to one prompt.

    Args:
        where: how messages begin.
        most: new tokens that were asked for.
        strings: for a server that names tokens by their strings.

    Raises:
        NoVerdict: it is no completion, is one of another prompt, or does not say which tokens were chosen.
        InputError: the tokenizer that strings need cannot be had.
    """
    try:
        (choice,) = answer["choices"]
        text, steps = choice.get("text"), _steps(choice)[:most]
        counted = answer.get("usage") or {}
        read, written = counted.get("prompt_tokens"), counted.get("completion_tokens")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        found = f"{json.dumps(answer):.160}"
        raise NoVerdict(f"{where}: expected a completion with one choice, found {found} ({error!r})") from error
    if is_whole(read) and read != len(prompt):
        raise NoVerdict(
            f"{where}: expected {len(prompt)} tokens, the server counts {read}: its tokenizer is another, or it puts a "
            "token in front"
        )
    if choice.get("prompt_token_ids") not in (None, list(prompt)):
        raise NoVerdict(
            f"{where}: the server says that it read other tokens than these; expected those that it was sent"
        )
    if not steps and (text or written):
        raise NoVerdict(
            f"{where}: expected token ids, or logprobs with the tokens' strings, found text alone ({text!r:.40}): its "
            "tokens cannot be known; have the server give logprobs"
        )
    if not steps:
        raise NoVerdict(f"{where}: expected at least one new token, found none: it chose an end token, or failed")
    by_string = isinstance(steps[0].name, str)
    if by_string and is_whole(written) and not 0 <= written - len(steps) <= (choice.get("finish_reason") == "stop"):
        raise NoVerdict(f"{where}: the server counts {written} new tokens and names {len(steps)}")
    return _row(where, steps, text, strings)


def _row(where: str, steps: Sequence[_Step], text: Any, strings: TokenStrings) -> Row:
    # Where strings together are the text, no character was made of several tokens.
    is_whole_text = "".join(str(step.name) for step in steps) == text
    tokens, logprobs = [], []
    for step in steps:
        token = _token(step.name, strings, is_whole_text)
        if token is None:
            break
        tokens.append(token)
        named = [(_token(name, strings), value) for name, value in step.logprobs.items() if name != step.name]
        own = [(token, step.logprobs[step.name])] if step.name in step.logprobs else []
        logprobs.append(own + [(other, value) for other, value in named if other not in (None, token)])
    if not tokens:
        raise NoVerdict(
            f"{where}: its first new token is given as {steps[0].name!r}, which is not the string of one token of the "
            "checkpoint's tokenizer; have the server give token ids"
        )
    return Row(tokens, logprobs if all(logprobs) else None, len(tokens) < len(steps))


def _token(name: Name, strings: TokenStrings, is_whole: bool = False) -> int | None:
    return name if isinstance(name, int) else strings.token_of(name, is_whole)


def _steps(choice: Mapping[str, Any]) -> list[_Step]:
    """Raises what reading any other JSON value as a choice of a completion comes to."""
    logprobs, ids = choice.get("logprobs"), choice.get("token_ids")
    if logprobs is None:
        steps = [_Step(token, {}) for token in _ids(ids or ())]
    elif "content" in logprobs:  # as chats have it, and llama.cpp's server everywhere
        steps = [_of_content(step) for step in logprobs["content"] or ()]
    else:
        names = [_name(name) for name in logprobs["tokens"]]
        own = logprobs.get("token_logprobs") or [None] * len(names)
        top = logprobs.get("top_logprobs") or [None] * len(names)
        steps = [
            _Step(name, _numbers([*(others or {}).items(), (name, value)]))
            for name, value, others in zip(names, own, top, strict=True)
        ]
    if ids is not None:
        steps = [_renamed(step, token) for step, token in zip(steps, _ids(ids), strict=True)]
    return steps


def _of_content(step: Mapping[str, Any]) -> _Step:
    def name(of: Mapping[str, Any]) -> Name:
        return _name(of["id"] if "id" in of else of["token"])

    others = [(name(other), other["logprob"]) for other in step.get("top_logprobs") or ()]
    return _Step(name(step), _numbers([*others, (name(step), step["logprob"])]))


def _numbers(pairs: Sequence[tuple[Any, Any]]) -> dict[Name, float]:
    """By name, what is not null."""
    return {_name(name): float(value) for name, value in pairs if value is not None}


def _renamed(step: _Step, name: Name) -> _Step:
    if name == step.name:
        return step
    return _Step(name, {name if other == step.name else other: value for other, value in step.logprobs.items()})


def _name(given: Any) -> Name:
    if isinstance(given, str):
        return int(given.removeprefix(ID)) if given.startswith(ID) else given
    return _ids([given])[0]


def _ids(given: Sequence[Any]) -> list[int]:
    if not all(map(is_whole, given)):
        raise TypeError("expected token ids that are whole numbers")
    return list(given)
