"""The prompts of a comparison: given, from a file, or the built-in set; always as token ids in the end."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refengine.config import Config
from refengine.errors import InputError, TokensError

Encode = Callable[[str], list[int]]

# English of many lengths, so that a batch is ragged; with repeats, names and numbers, so that attention has work to do.
BUILT_IN = (
    "Today is a good day",
    "Return",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "If the expression is true, the first value is returned; otherwise",
    "In 1969, three people left for the Moon. Two of them walked on it, the third stayed in orbit. Their names were",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n",
    "A class definition is an executable statement. The inheritance list usually gives a list of "
    "base classes, so each item in "
    "the list should evaluate to a class object. Classes without an inheritance list inherit, by default, from",
    "Question: A train leaves at nine in the morning and travels eighty kilometres in every hour. "
    "Another one leaves an hour "
    "later from the same station, on the same line, and travels one hundred kilometres in every "
    "hour. When does the second "
    "train catch up with the first, and how far from the station are they then? Answer: Let us "
    "think about it step by step.",
)


def read_prompts(path: Path, encode: Encode) -> list[list[int]]:
    """Prompts of a file: one a line, or JSON lines with "text" or "token_ids". Blank lines are passed over.

    Raises:
        InputError: the file cannot be read, holds no prompt, or a line is not what its beginning promises.
    """
    try:
        # By line feeds alone: JSON may hold the other separators of Unicode as they are. A byte-order mark is no text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: prompts could not be read ({error})") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: expected a prompt a line, found none")
    return [_prompt(f"{path}:{number}", line.removesuffix("\r"), encode) for number, line in numbered]


def encode_checked(where: str, text: str, encode: Encode) -> list[int]:
    """The token ids of a text. Raises InputError when it holds half a surrogate pair, which is no character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where}: expected text, found half a surrogate pair, which stands for no character")
    return encode(text)


def _prompt(where: str, line: str, encode: Encode) -> list[int]:
    if not line.lstrip().startswith("{"):
        return encode_checked(where, line, encode)
    try:
        given: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: begins like JSON but is not ({error})") from error
    if isinstance(given.get("text"), str):
        return encode_checked(where, given["text"], encode)
    ids = given.get("token_ids")
    if isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        return list(ids)
    raise InputError(f'{where}: expected "text" (a string) or "token_ids" (whole numbers), found keys {sorted(given)}')


def check_prompts(prompts: Sequence[Sequence[int]], config: Config, max_new_tokens: int) -> None:
    """Raises TokensError at the first prompt that is empty, holds an id out of range, or leaves no room to decode."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise TokensError(f"prompt {number}: expected at least one token, found none")
        wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise TokensError(f"prompt {number}: expected token ids from 0 to {config.vocab_size - 1}, found {wrong}")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise TokensError(
                f"prompt {number}: {len(prompt)} tokens and {max_new_tokens} new ones exceed max_position_embeddings "
                f"{config.max_position_embeddings}; shorten it or lower --max-new-tokens"
            )
