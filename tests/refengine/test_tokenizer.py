"""The tokenizer inside a GGUF file against the same tokenizer as files of the tokenizers library."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.refengine.tokenizer_files import (
    NORMAL,
    SPECIALS,
    byte_level_file,
    sentencepiece_file,
    train_byte_level,
    write_directory,
    write_gguf,
)


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return train_byte_level()


@pytest.fixture(scope="module")
def directory(trained: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("checkpoint"), trained)


@pytest.fixture(scope="module")
def both(directory: Path, trained: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return load_tokenizer(directory), load_tokenizer(byte_level_file(path, trained))


texts = st.lists(st.sampled_from([*SPECIALS, "12345", "they're", "  ", "\n", " \u00e9"]) | st.text(), min_size=1)


@given(pieces=texts)
def test_a_gguf_tokenizer_encodes_and_decodes_as_the_original(both: tuple[Any, Any], pieces: list[str]) -> None:
    original, from_gguf = both
    text = "".join(pieces) or "x"
    expected = encode_prompt(original, text, chat=False)
    assert encode_prompt(from_gguf, text, chat=False) == expected
    assert from_gguf.decode(expected) == original.decode(expected)


def test_special_tokens_have_the_ids_that_the_file_says(both: tuple[Any, Any]) -> None:
    original, from_gguf = both
    assert (from_gguf.bos_token_id, from_gguf.eos_token_id) == (1, 2)
    assert (original.bos_token_id, original.eos_token_id) == (1, 2)
    assert from_gguf.unk_token_id is None
    assert from_gguf.convert_ids_to_tokens(from_gguf("<|im_end|>")["input_ids"]) == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "\u01201234567", "\u0120\u0120", "\u0120'", "LL", "\u010a", "\u010a", "x"]),
        ("smollm", ["ab", "\u0120", *"1234567", "\u0120\u0120", "\u0120'", "LL", "\u010a", "\u010a", "x"]),
        (
            "llama-bpe",
            ["ab", "\u0120", "123", "456", "7", "\u0120\u0120", "\u0120'", "LL", "\u010a\u010a", "x"],
        ),
        ("tekken", ["ab", "\u0120", *"1234567", "\u0120\u0120", "\u0120'", "LL", "\u010a\u010a", "x"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_of_the_file_says(
    tmp_path: Path, trained: dict[str, Any], pre: str, pieces: list[str]
) -> None:
    tokenizer = load_tokenizer(byte_level_file(tmp_path / "model.gguf", trained, pre=pre))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234567   'LL\n\nx")
    assert [piece for piece, _ in cut] == pieces


def test_llama_3_takes_a_word_of_the_vocabulary_whole_although_no_merge_makes_it(tmp_path: Path) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "zq"]
    types = [NORMAL] * len(tokens)
    llama3 = load_tokenizer(write_gguf(tmp_path / "a.gguf", tokens, types, pre="llama-bpe", add_bos_token=False))
    gpt2 = load_tokenizer(write_gguf(tmp_path / "b.gguf", tokens, types, pre="gpt-2", add_bos_token=False))
    assert llama3.tokenize("zq") == ["zq"]
    assert gpt2.tokenize("zq") == ["z", "q"]


@pytest.mark.parametrize(
    ("pre", "add_bos", "add_eos", "expected"),
    [
        ("smollm", None, None, []),
        ("smollm", True, None, [1]),
        ("llama-bpe", None, None, [1]),
        ("llama-bpe", False, None, []),
        ("smollm", False, True, [2]),
    ],
)
def test_a_bos_and_an_eos_are_added_as_the_file_says(
    tmp_path: Path, trained: dict[str, Any], pre: str, add_bos: Any, add_eos: Any, expected: list[int]
) -> None:
    path = byte_level_file(tmp_path / "m.gguf", trained, pre=pre, add_bos_token=add_bos, add_eos_token=add_eos)
    tokenizer = load_tokenizer(path)
    ids = encode_prompt(tokenizer, "cat", chat=False)
    assert [token for token in ids if token in (1, 2)] == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cat"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the", ["\u2581the"]),
        ("the in", ["\u2581the", "\u2581", "in"]),
        (" the", ["\u2581\u2581", "t", "he"]),
        ("  the", ["\u2581\u2581", "\u2581the"]),
        ("\u00e9", ["\u2581", "<0xC3>", "<0xA9>"]),
        ("the[INST]in", ["\u2581the", "[INST]", "\u2581", "in"]),
    ],
)
def test_a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes(
    tmp_path: Path, text: str, tokens: list[str]
) -> None:
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path / "model.gguf"))
    ids = encode_prompt(tokenizer, text, chat=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *tokens]


def test_a_sentencepiece_file_may_ask_for_no_space_and_no_bos(tmp_path: Path) -> None:
    path = sentencepiece_file(tmp_path / "model.gguf", add_space_prefix=False, add_bos_token=False)
    tokenizer = load_tokenizer(path)
    assert tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "the", chat=False)) == ["t", "he"]


def test_a_chat_prompt_goes_through_the_template_once_and_ends_where_the_assistant_begins(
    both: tuple[Any, Any],
) -> None:
    pytest.importorskip("jinja2")
    for tokenizer in both:
        ids = encode_prompt(tokenizer, "the cat", chat=True)
        assert tokenizer.decode(ids) == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
        assert ids.count(1) == 2


def test_a_chat_prompt_does_not_get_a_second_bos(tmp_path: Path, trained: dict[str, Any]) -> None:
    pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(byte_level_file(tmp_path / "model.gguf", trained, add_bos_token=True))
    assert encode_prompt(tokenizer, "the cat", chat=True).count(1) == 2


def test_loading_and_encoding_says_nothing_on_either_stream(directory: Path) -> None:
    program = (
        "import sys; from refengine.tokenizer import encode_prompt, load_tokenizer\n"
        "encode_prompt(load_tokenizer(sys.argv[1]), 'the cat ' * 9000, chat=False)"
    )
    done = subprocess.run([sys.executable, "-c", program, directory], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_tokenizer_is_read_without_the_configuration_of_the_model(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    # Sound, since head_dim is given; but transformers refuses a hidden size that the heads do not divide.
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | heads))
    assert load_tokenizer(tmp_path).tokenize("the cat") == load_tokenizer(directory).tokenize("the cat")
