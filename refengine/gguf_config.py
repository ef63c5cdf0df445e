"""The metadata of a GGUF file of a Llama as a configuration; what a plain Llama does not have is refused."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from refengine.config import Config, RopeParameters
from refengine.errors import CheckpointError, ConfigError
from refengine.gguf_file import GgufFile
from refengine.rope import rope_inverse_frequencies

ROPE_DIVISORS = "rope_freqs.weight"

# `llama.*` metadata: what is read, and what is accepted only with the value that changes nothing. A key in
# none of these lists is refused, since a setting that is not understood may change what the model computes.
SIZES = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
)
EPSILON = "attention.layer_norm_rms_epsilon"
OPTIONAL_SIZES = (
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.original_context_length",
)
NUMBERS = (EPSILON, "rope.freq_base", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
FACTORS = ("rope.scaling.factor", "rope.scale_linear")  # 0 means that there is none
OTHERS = ("rope.scaling.type", "rope.scaling.finetuned", "tensor_data_layout")
NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}

LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.3; Llama 3.2
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192  # of all of them


def llama_metadata(file: GgufFile) -> dict[str, Any]:
    """The `llama.*` metadata without that prefix, checked.

    Raises:
        CheckpointError: the file holds another architecture, a part of a model, or not all that is needed.
        ConfigError: a value has the wrong type or range, or is not known to leave the mathematics alone.
    """
    architecture, parts = file.value("general.architecture"), file.value("split.count")
    if architecture != "llama":
        raise CheckpointError(
            f"{file.path}: general.architecture: expected 'llama' (Mistral's GGUF files say so too), "
            f"found {architecture!r}: this family is not supported"
        )
    if parts not in (None, 0, 1):
        raise CheckpointError(
            f"{file.path}: expected a whole model, found one of {parts} parts; "
            "join them with llama.cpp's `llama-gguf-split --merge`"
        )
    llama = {key: _one_for_all_layers(value) for key, value in file.section("llama.").items()}
    for key in (*SIZES, EPSILON):
        if key not in llama:
            raise CheckpointError(f"{file.path}: no metadata llama.{key}; the file is incomplete")
    for key, value in llama.items():
        if complaint := _complaint(key, value):
            printable = ascii(key)[1:-1]
            raise ConfigError(f"{file.path}: llama.{printable}: found {value!r}; {complaint}")
    return llama


def config_of(
    file: GgufFile, llama: Mapping[str, Any], of_tensors: Mapping[str, Any], divisors_P: np.ndarray | None
) -> Config:
    """The configuration of a GGUF file.

    Args:
        file: for the token ids, and for messages.
        llama: as `llama_metadata` gives it.
        of_tensors: the keys of a config.json that the tensors decide, `vocab_size` among them.
        divisors_P: the file's table of divisors of the rotary frequencies, or None.

    Raises:
        ConfigError: the metadata contradict each other, or ask for mathematics that is not supported.
    """
    head_dim = llama.get("attention.key_length") or llama["embedding_length"] // llama["attention.head_count"]
    try:
        for key in ("attention.value_length", "rope.dimension_count"):
            if llama.get(key, head_dim) != head_dim:
                raise ConfigError(f"llama.{key}: expected the head size {head_dim}, found {llama[key]}")
        rope = {"rope_parameters": _rope_parameters(llama, divisors_P, head_dim)}
        return Config.from_dict({**of_tensors, **_config_json(file, llama), "head_dim": head_dim} | rope)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error


def _one_for_all_layers(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value and value == value[:1] * len(value) else value


def _complaint(key: str, value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in (*SIZES, *OPTIONAL_SIZES):
        fits = is_number and isinstance(value, int) and value > 0
        return None if fits else "expected one positive whole number for all layers"
    if key in (*NUMBERS, *FACTORS):
        fits = is_number and (value > 0 or (key in FACTORS and value == 0))
        return None if fits else "expected one positive number"
    if key in OTHERS or (key in NEUTRAL and value == NEUTRAL[key]):
        return None
    expected = f"expected {NEUTRAL[key]!r}" if key in NEUTRAL else "expected no such key"
    return f"this may change the mathematics and is not supported, {expected}"


def _config_json(file: GgufFile, llama: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata under the keys of a config.json."""
    ends: list[Any] = []
    for key in ("eos", "eot", "eom"):
        end = file.value(f"tokenizer.ggml.{key}_token_id")
        ends += [] if end is None or end in ends else [end]
    known = {
        "model_type": "llama",
        "vocab_size": llama.get("vocab_size"),
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama.get("attention.head_count_kv", llama["attention.head_count"]),
        "hidden_act": "silu",
        "rms_norm_eps": llama[EPSILON],
        "max_position_embeddings": llama["context_length"],
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends,
    }
    return {key: value for key, value in known.items() if value is not None}


def _rope_parameters(llama: Mapping[str, Any], divisors_P: np.ndarray | None, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` as in a config.json. Without a base in the file it is 10000; no type means linear.

    Source: llama.cpp, src/llama-model.cpp, "rope_freq_base (optional)" and the lines after it; the format's
    description (ggml, docs/gguf.md) names the keys and leaves what their absence means to the reader.
    """
    theta = llama.get("rope.freq_base", 10000.0)
    factor = llama.get("rope.scaling.factor") or llama.get("rope.scale_linear") or 1.0
    rope_type = llama.get("rope.scaling.type", "linear")
    if rope_type == "none" or (rope_type == "linear" and factor == 1.0):
        return {"rope_theta": theta} | ({} if divisors_P is None else _llama3(divisors_P, theta, head_dim))
    if divisors_P is not None:
        raise ConfigError(f"{ROPE_DIVISORS}: found beside llama.rope.scaling.type {rope_type!r}; expected one of them")
    given = {"rope_type": rope_type, "rope_theta": theta, "factor": factor}
    if rope_type == "linear":
        return given
    if rope_type == "yarn":
        original = llama.get("rope.scaling.original_context_length")
        betas = {key: llama.get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
        return given | {"original_max_position_embeddings": original} | betas
    raise ConfigError(f"llama.rope.scaling.type: expected none, linear or yarn, found {rope_type!r}")


def _llama3(divisors_P: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 settings behind a table of frequency divisors, which is all that GGUF keeps of them."""
    if np.all(divisors_P == 1):
        return {}
    plain_P, _ = rope_inverse_frequencies(RopeParameters("default", theta), head_dim, 1, 1)
    if divisors_P.shape == plain_P.shape and divisors_P.min() >= 1:
        for factor in (*LLAMA3_FACTORS, float(divisors_P.max())):
            settings = RopeParameters("llama3", theta, factor, LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL)
            scaled_P, _ = rope_inverse_frequencies(settings, head_dim, 1, 1)
            # The table was written in float32, from frequencies rounded to float32: about 1e-6 at worst.
            if np.allclose(divisors_P, plain_P / scaled_P, rtol=1e-5, atol=0.0):
                return {key: value for key, value in asdict(settings).items() if value is not None}
    raise ConfigError(
        f"{ROPE_DIVISORS}: these divisors of the rotary frequencies are not those of Llama 3.1 to 3.3 "
        f"(low_freq_factor {LLAMA3_LOW}, high_freq_factor {LLAMA3_HIGH}, original_max_position_embeddings "
        f"{LLAMA3_ORIGINAL}), so no configuration can be made of them"
    )
