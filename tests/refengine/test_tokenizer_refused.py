"""Tokenizers and prompts that cannot be used: each is refused in one line that says why."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from refengine.errors import CheckpointError, InputError, MissingPackage, TokensError
from refengine.gguf_tokenizer import SPLITTINGS
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.refengine.tokenizer_files import (
    NORMAL,
    byte_level_file,
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
def tokenizer(directory: Path) -> Any:
    return load_tokenizer(directory)


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no users here') }}", "{{ messages.x.y }}"])
def test_a_chat_template_that_does_not_render_is_refused(
    tmp_path: Path, trained: dict[str, Any], template: str
) -> None:
    pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(byte_level_file(tmp_path / "model.gguf", trained, chat_template=template))
    with pytest.raises(InputError, match="chat template cannot be used"):
        encode_prompt(tokenizer, "x", chat=True)


def test_chat_is_refused_where_there_is_no_template(tmp_path: Path, trained: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(byte_level_file(tmp_path / "model.gguf", trained, chat_template=None))
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(tokenizer, "x", chat=True)


def test_chat_without_jinja_names_the_extra(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingPackage, match="install the tokenizer extra"):
        encode_prompt(tokenizer, "x", chat=True)


@pytest.mark.parametrize("chat", [False, True])
def test_an_empty_prompt_is_refused(tokenizer: Any, chat: bool) -> None:
    with pytest.raises(TokensError, match="prompt: expected some text"):
        encode_prompt(tokenizer, "", chat=chat)


@pytest.mark.parametrize("pre", [None, "default", "deepseek-llm"])
def test_a_pre_tokenizer_that_is_not_known_is_refused_by_name(
    tmp_path: Path, trained: dict[str, Any], pre: str | None
) -> None:
    path = byte_level_file(tmp_path / "model.gguf", trained, pre=pre)
    with pytest.raises(InputError, match=rf"tokenizer\.ggml\.pre: .*{pre!r}") as refused:
        load_tokenizer(path)
    assert all(known in str(refused.value) for known in SPLITTINGS)


def test_a_kind_of_tokenizer_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", ["a"], [NORMAL], model="bert")
    with pytest.raises(InputError, match="'bert'"):
        load_tokenizer(path)


def test_merges_of_another_vocabulary_are_refused(tmp_path: Path, trained: dict[str, Any]) -> None:
    path = byte_level_file(tmp_path / "model.gguf", trained, merges=["zzz yyy"])
    with pytest.raises(InputError, match=r"model\.gguf: the tokenizer cannot be read"):
        load_tokenizer(path)


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path, trained: dict[str, Any]) -> None:
    path = byte_level_file(tmp_path / "model.gguf", trained, bos_token_id=100_000)
    with pytest.raises(InputError, match=r"model\.gguf: the tokenizer cannot be read"):
        load_tokenizer(path)


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and no more")
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": "1.0", "added_tokens": [], "model": {"type": "None such"}}'],
    ids=["empty", "half", "a-list", "unknown-model"],
)
def test_a_damaged_tokenizer_json_is_refused_in_one_line(tmp_path: Path, directory: Path, content: str) -> None:
    shutil.copy(directory / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="the tokenizer cannot be read") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_path_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a checkpoint directory or a \.gguf file"):
        load_tokenizer(tmp_path / "nothing.gguf")


def test_without_transformers_the_message_names_the_extra(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackage, match="install the tokenizer extra"):
        load_tokenizer(directory)
