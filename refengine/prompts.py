"""Prompts of a file, as token ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refengine.errors import InputError

Encode = Callable[[str], list[int]]


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
