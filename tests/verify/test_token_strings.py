"""Tokens as strings and back: what a server names so is the token that it chose, or has no id."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.errors import InputError
from refengine.tokenizer import load_tokenizer
from tests.refengine import tokenizer_files
from tests.verify.conftest import TINY_LLAMA
from verify.candidates.openai_answers import row_of
from verify.candidates.token_strings import TokenStrings
from verify.errors import NoVerdict

TOKENS = 384


@pytest.fixture(scope="module")
def strings() -> TokenStrings:
    return TokenStrings(lambda: load_tokenizer(TINY_LLAMA), TOKENS)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> TokenStrings:
    """Of a tokenizer as sentencepiece makes them, with a token for every byte."""
    path = tokenizer_files.sentencepiece_file(tmp_path_factory.mktemp("pieces") / "tokenizer.gguf")
    return TokenStrings(lambda: load_tokenizer(path), 270)


@given(st.lists(st.integers(2, TOKENS - 1), min_size=1, max_size=12), st.sampled_from(["ignore", "replace"]))
def test_tokens_read_from_strings_are_those_that_were_written_as_far_as_they_go(strings, tokens, errors):
    """As llama-cpp-python writes tokens, and as others do: bytes that are no character dropped, or replaced."""
    as_bytes = [bytes_of(strings, token) for token in tokens]
    text = b"".join(as_bytes).decode("utf-8", errors)
    logprobs = {"tokens": [of.decode("utf-8", errors) for of in as_bytes]}
    answer = {"choices": [{"text": text, "logprobs": logprobs}]}
    try:
        row = row_of("here", answer, [5], len(tokens), strings)
    except NoVerdict:
        assert not is_whole(as_bytes[0])
        return
    assert list(row.tokens) == tokens[: len(row.tokens)]
    assert row.is_cut == (len(row.tokens) < len(tokens))
    assert row.is_cut <= (not all(map(is_whole, as_bytes)))


def bytes_of(strings: TokenStrings, token: int) -> bytes:
    """A token's bytes, by the alphabet that byte-level tokenizers write them in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    of_letter = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    return bytes(of_letter[letter] for letter in strings.tokenizer.convert_ids_to_tokens(token))


def is_whole(written: bytes) -> bool:
    return written.decode("utf-8", "ignore").encode() == written


@pytest.mark.parametrize("token", ["\u2581the", "\u2581t", "he", "\u2581\u2581", "t"])
def test_a_space_in_front_belongs_to_a_token_and_a_byte_yields_to_the_token_that_is_it(pieces, token):
    (expected,) = pieces.tokenizer.convert_tokens_to_ids([token])
    assert pieces.token_of(token.replace("\u2581", " "), is_whole=False) == expected


def test_a_byte_that_is_a_character_has_its_id_and_one_that_is_none_has_not(pieces):
    assert pieces.token_of("Q", is_whole=True) == 3 + ord("Q")
    assert pieces.token_of("\ufffd", is_whole=True) is None
    assert pieces.token_of("", is_whole=True) is None


def test_a_prompt_is_sent_as_text_only_where_the_tokenizer_makes_the_same_of_that(strings):
    tokenizer = strings.tokenizer
    whole = tokenizer("If the expression is true")["input_ids"]
    assert strings.text_of(whole) == "If the expression is true"
    in_letters = [token for letter in "If the" for token in tokenizer(letter)["input_ids"]]
    assert len(in_letters) == 6
    for tokens in (in_letters, [0, *whole], [0]):
        with pytest.raises(InputError, match="of its text the tokenizer makes other tokens"):
            strings.text_of(tokens)
