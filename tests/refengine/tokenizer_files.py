"""Small tokenizers as files: as a checkpoint directory, and as llama.cpp's converter puts them in GGUF."""

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = 3 * (
    "The cat sat on the mat, and 12345 cats sat on 678 mats; they're all there, aren't they? In 1999 the\n"
    "  weather was good: 23.5 degrees. def add(left, right): return left + right  # 2024-12-31 "
    "\u00e9t\u00e9 na\u00efve \u4e2d\u6587 "
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def write_gguf(path: Path, tokens: list[str], types: list[int], model: str = "gpt2", **keys: Any) -> Path:
    """`keys`: tokenizer.ggml.* metadata by name, and chat_template; None leaves a key out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in keys.items():
        name = f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"
        match value:
            case None:
                pass
            case str():
                writer.add_string(name, value)
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case list():
                writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_file(path: Path, trained: dict[str, Any], **changed: Any) -> Path:
    tokens = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].get)
    keys: dict[str, Any] = {
        "pre": "smollm",
        "merges": [" ".join(merge) for merge in trained["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }
    types = [CONTROL if token in SPECIALS else NORMAL for token in tokens]
    return write_gguf(path, tokens, types, **keys | changed)


def train_byte_level() -> dict[str, Any]:
    """A byte-level BPE as SmolLM2's, small."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=330, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    )
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    return parsed


def write_directory(path: Path, trained: dict[str, Any]) -> Path:
    """A checkpoint directory of nothing but a tokenizer."""
    (path / "tokenizer.json").write_text(json.dumps(trained))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def sentencepiece_file(path: Path, **changed: Any) -> Path:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["\u2581\u2581", "\u2581t", "he", "in", "\u2581the", "\u2581", "t", "h", "e", "i", "n", "[INST]"]
    types = [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(words) - 1), USER_DEFINED]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words))]
    keys = {"scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return write_gguf(path, pieces + words, types, model="llama", **keys | changed)
