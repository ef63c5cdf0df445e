"""Text to token ids and back: the tokenizer of a checkpoint directory, or the one inside a GGUF file."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refengine.errors import InputError, MissingPackage, TokensError
from refengine.gguf_file import GgufFile
from refengine.gguf_tokenizer import TokenizerErrors, gguf_backend, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
SPECIAL_TOKENS: Mapping[str, str] = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

Message = dict[str, str]  # of a conversation: its "role" (system, user or assistant) and its "content"


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint directory (from its files alone, never the network) or of a `.gguf` file.

    Raises:
        InputError: there is no readable tokenizer at `path`, or a GGUF's is of a kind that is not supported.
        MissingPackage: a package that is needed is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return _from_directory(path)
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    raise InputError(
        f"{path}: expected a checkpoint directory or a .gguf file to take the tokenizer from, found neither"
    )


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool) -> list[int]:
    """Token ids of a prompt, with those that the tokenizer itself puts around a text (often a BOS).

    Args:
        tokenizer: as `load_tokenizer` gives it.
        text: what the user wrote; with `chat`, the user's first message.
        chat: put the text through the model's chat template, ready for the assistant's answer.

    Raises:
        TokensError: the text is empty, or holds nothing that becomes a token.
        InputError: `chat` is asked for and the model has no chat template, or one that does not render.
        MissingPackage: the chat template needs a package that is not installed.
    """
    if not text:
        raise TokensError("prompt: expected some text, found an empty one")
    user = {"role": "user", "content": text}
    ids: list[int] = encode_chat(tokenizer, [user]) if chat else tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise TokensError(f"prompt: expected text that becomes at least one token, found {text!r}")
    return ids


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation through the model's chat template, ready for the assistant's answer.

    Raises:
        InputError: the model has no chat template, or one that does not render these messages.
        MissingPackage: the chat template needs a package that is not installed.
    """
    if not tokenizer.chat_template:
        raise InputError("this model has no chat template; give the prompt as plain text")
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise MissingPackage("a chat template needs the jinja2 package; install the tokenizer extra") from error

    try:
        rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise InputError(
            f"the model's chat template cannot be used ({one_line(error)}); give the prompt as plain text"
        ) from error
    # The template has written the special tokens already.
    ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _from_directory(path: Path) -> "PreTrainedTokenizerBase":
    transformers = _transformers(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{path}: no tokenizer.json; copy the tokenizer's files here from the model's source")
    # tokenizer.json says everything. AutoTokenizer would read config.json too, refuse some that are sound,
    # and for some families build another tokenizer than the file describes.
    whole = (path / "tokenizer.json").is_file()
    loader = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
    with TokenizerErrors(path), _without_notices("transformers.tokenization_utils_base"):
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def _from_gguf(path: Path) -> "PreTrainedTokenizerBase":
    transformers = _transformers(path)
    file = GgufFile.open(path)
    backend, tokens = gguf_backend(file), file.value("tokenizer.ggml.tokens")
    ids = {name: file.value(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    with TokenizerErrors(path):
        tokenizer: PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **{f"{name}_token": tokens[token] for name, token in ids.items() if token is not None},
            chat_template=file.value("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
        )
    return tokenizer


def _transformers(path: Path) -> Any:
    try:
        with _without_notices("transformers"):
            import transformers
    except ImportError as error:
        raise MissingPackage(
            f"{path}: reading a tokenizer needs the transformers package; install the tokenizer extra"
        ) from error
    return transformers


@contextmanager
def _without_notices(logger: str) -> Iterator[None]:
    """Drops what one logger says.

    Transformers warns whoever has no torch, and of a tokenizer read as its file has it, not by its class.
    """

    def drop(record: logging.LogRecord) -> bool:
        return False

    logging.getLogger(logger).addFilter(drop)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(drop)
