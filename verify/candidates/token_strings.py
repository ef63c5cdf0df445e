"""Token ids as the strings that servers write for them, and back, by a checkpoint's own tokenizer."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from refengine.errors import InputError
from refengine.tokenizer import encode_prompt

NO_CHARACTER = "\ufffd"  # what decoding makes of bytes that are a part of a character
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token that stands for a byte where the vocabulary has no better one
BEFORE = "a"  # what a token is decoded after: some tokenizers drop a space at the beginning of a text


class TokenStrings:
    """What each token is within a text.

    Strings lose something: several tokens may be written alike, most of all those that are parts of characters, of
    which a server writes a replacement character or only what is whole. What cannot be told apart has no id here.
    """

    def __init__(self, load: Callable[[], Any], vocab_size: int):
        """Args:
        load: gives the tokenizer, as `load_tokenizer` does; called when a string has to be read or written.
        vocab_size: how many ids there are.
        """
        self._load = load
        self._vocab_size = vocab_size

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return self._load()

    def text_of(self, prompt: Sequence[int]) -> str:
        """The text that is this prompt. Raises InputError where the tokenizer makes other tokens of it."""
        text = self._decoded(prompt, skip_special_tokens=True)
        if not text or encode_prompt(self.tokenizer, text, chat=False) != list(prompt):
            raise InputError(
                "it was to be sent as text, and of its text the tokenizer makes other tokens; give a prompt as text"
            )
        return text

    def token_of(self, string: str, is_whole: bool) -> int | None:
        """The one token that is written so, or None.

        Args:
            string: of one token.
            is_whole: it is known that the token is no part of a character.
        """
        tokens = self._whole[string]
        if not is_whole:
            tokens = tokens + self._parts[string]
        return tokens[0] if len(tokens) == 1 else None

    @cached_property
    def _whole(self) -> Mapping[str, list[int]]:
        """Tokens that are whole characters, by string; those that stand for a byte only where no other does."""
        found: dict[str, list[int]] = defaultdict(list)
        names = self.tokenizer.convert_ids_to_tokens(range(self._vocab_size))
        is_byte = [name is not None and BYTE.fullmatch(name) is not None for name in names]
        for token in sorted(range(self._vocab_size), key=is_byte.__getitem__):
            string = self._strings[token]
            if string and NO_CHARACTER not in string and not (is_byte[token] and found[string]):
                found[string].append(token)
        return found

    @cached_property
    def _parts(self) -> Mapping[str, list[int]]:
        """Tokens that hold a part of a character, by what is left when that is dropped."""
        found: dict[str, list[int]] = defaultdict(list)
        for token, string in enumerate(self._strings):
            if NO_CHARACTER in string:
                found[string.replace(NO_CHARACTER, "")].append(token)
        return found

    @cached_property
    def _strings(self) -> Sequence[str]:
        before = self.tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
        start = len(self._decoded(before))
        return [self._decoded([*before, token])[start:] for token in range(self._vocab_size)]

    def _decoded(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text
