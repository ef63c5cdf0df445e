"""What a `config.json` says about the mathematics, and what is refused because it would change it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refengine.errors import ConfigError

MODEL_TYPES = ("llama", "mistral")

# Settings of other families, or of later versions, that change what the model computes. Each is accepted only with one
# of its neutral values; a key that is listed neither here nor in Config has no effect on a Llama and is ignored.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1, 1.0),
    "pretraining_tp": (None, 1),
    "qk_layernorm": (None, False),
    "quantization_config": (None,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "use_qk_norm": (None, False),
}

# rope_type -> the keys it needs and the keys it may have, beside rope_theta and rope_type.
ROPE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding settings under their `config.json` keys; those that a type does not use are None."""

    rope_type: str
    rope_theta: float
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


@dataclass(frozen=True)
class Config:
    """A Llama-family model on paper: the fields are the keys of `config.json`, checked and with nothing left open.

    `sliding_window` None means full attention; otherwise a token sees itself and the `sliding_window - 1` before it.
    `eos_token_id` holds every end token. `dtype` is the dtype that the checkpoint says it is stored in.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: RopeParameters
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Config":
        """The configuration that a parsed `config.json` describes.

        Raises:
            ConfigError: a needed key is missing, a value is out of range or contradicts another, or the mathematics
                asked for is not supported.
        """
        model_type = _model_type(given)
        _refuse_what_changes_the_mathematics(given)
        heads = _positive_int(given, "num_attention_heads")
        kv_heads = _key_value_heads(given, model_type, heads)
        hidden_size = _positive_int(given, "hidden_size")
        head_dim, rope_parameters = _head_dim(given, hidden_size, heads), _rope_parameters(given)
        _check_rope_range(rope_parameters, head_dim)
        return cls(
            model_type=model_type,
            vocab_size=_positive_int(given, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive_int(given, "intermediate_size"),
            num_hidden_layers=_positive_int(given, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive_number(given, "rms_norm_eps"),
            max_position_embeddings=_positive_int(given, "max_position_embeddings"),
            rope_parameters=rope_parameters,
            hidden_act=_hidden_act(given),
            attention_bias=_flag(given, "attention_bias", only_for=("llama",)),
            mlp_bias=_flag(given, "mlp_bias", only_for=("llama",)),
            tie_word_embeddings=_flag(given, "tie_word_embeddings", only_for=MODEL_TYPES),
            sliding_window=_sliding_window(given, model_type),
            eos_token_id=end_tokens(given.get("eos_token_id")),
            bos_token_id=_token_or_none(given, "bos_token_id"),
            dtype=str(given.get("dtype") or given.get("torch_dtype") or "float32"),
        )


def end_tokens(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as it stands in a JSON file (absent, one id, or a list of them) as a tuple."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_int(token) and token >= 0 for token in listed):
        raise ConfigError(f"eos_token_id: expected a token id or a list of them, found {value!r}")
    return tuple(listed)


def _model_type(given: Mapping[str, Any]) -> str:
    model_type = given.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, found {model_type!r}: this family is not supported")
    return str(model_type)


def _refuse_what_changes_the_mathematics(given: Mapping[str, Any]) -> None:
    for key, neutral in NEUTRAL.items():
        if key in given and given[key] not in neutral:
            raise ConfigError(f"{key}: found {given[key]!r}, which changes the mathematics and is not supported; expected {neutral[-1]!r} or no such key")
    other = set(given.get("layer_types") or ()) - {"full_attention" if given.get("sliding_window") is None else "sliding_attention"}
    if other:
        raise ConfigError(f"layer_types: found {sorted(other)}, which changes the mathematics and is not supported; expected the same attention in every layer")


def _key_value_heads(given: Mapping[str, Any], model_type: str, heads: int) -> int:
    if given.get("num_key_value_heads") is None and model_type == "llama":
        return heads  # checkpoints older than grouped-query attention do not have the key
    kv_heads = _positive_int(given, "num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads: expected a divisor of num_attention_heads {heads}, found {kv_heads}")
    return kv_heads


def _head_dim(given: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    if given.get("head_dim") is None:
        if hidden_size % heads:
            raise ConfigError(f"head_dim: not given, and hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden_size // heads
    else:
        head_dim = _positive_int(given, "head_dim")
    if head_dim % 2:
        raise ConfigError(f"head_dim: expected an even number (rotary embedding turns pairs), found {head_dim}")
    return head_dim


def _hidden_act(given: Mapping[str, Any]) -> str:
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act: expected 'silu', found {given['hidden_act']!r}")
    return "silu"


def _sliding_window(given: Mapping[str, Any], model_type: str) -> int | None:
    if model_type == "mistral" and "sliding_window" not in given:
        # transformers would silently take 4096 here, other readers full attention: nobody can know what was meant.
        raise ConfigError("sliding_window: missing; a mistral config must say a number of tokens, or null for full attention")
    if given.get("sliding_window") is None:
        return None
    if model_type == "llama":
        raise ConfigError(f"sliding_window: found {given['sliding_window']!r}, but a llama attends to everything; expected null or model_type 'mistral'")
    return _positive_int(given, "sliding_window")


def _check_rope_range(rope: RopeParameters, head_dim: int) -> None:
    """Settings at which a variant's formula divides by zero."""
    if rope.rope_type == "dynamic" and head_dim <= 2:
        raise ConfigError(f"head_dim: rope_type 'dynamic' needs more than 2 dimensions a head, found {head_dim}")
    if rope.rope_type == "yarn" and rope.rope_theta <= 1:
        raise ConfigError(f"rope_theta: rope_type 'yarn' needs a base above 1, found {rope.rope_theta}")
    if rope.rope_type == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:
        raise ConfigError("rope_parameters: expected low_freq_factor below high_freq_factor, found "
                          f"{rope.low_freq_factor} and {rope.high_freq_factor}")


def _rope_parameters(given: Mapping[str, Any]) -> RopeParameters:
    """Both spellings: `rope_theta` and `rope_scaling` at the top (older), or everything in `rope_parameters`."""
    nested = dict(given.get("rope_parameters") or {})
    scaling = dict(given.get("rope_scaling") or {})
    if nested and scaling and nested != scaling:
        raise ConfigError("rope_scaling: found beside rope_parameters; expected one of them")
    said = nested or scaling
    thetas = {float(_positive_number(where, "rope_theta")) for where in (given, said) if where.get("rope_theta") is not None}
    if len(thetas) != 1:
        found = "none" if not thetas else " and ".join(map(str, sorted(thetas)))
        raise ConfigError(f"rope_theta: expected one value, at the top or inside rope_parameters, found {found}")
    rope_type = said.get("rope_type") or said.get("type") or "default"
    if rope_type not in ROPE_KEYS:
        raise ConfigError(f"rope_type: expected one of {', '.join(ROPE_KEYS)}, found {rope_type!r}")
    if said.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"rope_parameters.partial_rotary_factor: expected 1.0, found {said['partial_rotary_factor']!r}")
    needed, optional = ROPE_KEYS[rope_type]
    if said.get("original_max_position_embeddings") is None and "original_max_position_embeddings" in needed:
        raise ConfigError(f"rope_parameters.original_max_position_embeddings: missing; rope_type {rope_type!r} needs it")
    numbers = {key: _positive_number(said, key) for key in needed}
    numbers |= {key: _positive_number(said, key) for key in optional if key != "truncate" and said.get(key) is not None}
    truncate = said.get("truncate", True) if "truncate" in optional else None
    if truncate not in (None, True, False) or ("truncate" in said and truncate is None):
        raise ConfigError(f"rope_parameters.truncate: expected true or false, found {said['truncate']!r}")
    outer = given.get("original_max_position_embeddings")
    if outer is not None and outer != said.get("original_max_position_embeddings", outer):
        raise ConfigError(f"original_max_position_embeddings: found {outer} at the top and another value inside the rope parameters; expected one")
    return RopeParameters(rope_type=rope_type, rope_theta=thetas.pop(), truncate=truncate, **numbers)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive_int(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key)
    if not _is_int(value) or value <= 0:
        raise ConfigError(f"{key}: expected a positive whole number, found {'nothing' if value is None else repr(value)}")
    return int(value)


def _positive_number(given: Mapping[str, Any], key: str) -> float:
    value = given.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}: expected a positive number, found {'nothing' if value is None else repr(value)}")
    return value


def _flag(given: Mapping[str, Any], key: str, only_for: tuple[str, ...]) -> bool:
    value = given.get(key)
    if value not in (None, False, True):
        raise ConfigError(f"{key}: expected true or false, found {value!r}")
    if value and given["model_type"] not in only_for:
        raise ConfigError(f"{key}: found true, but a {given['model_type']} has none; expected false")
    return bool(value)


def _token_or_none(given: Mapping[str, Any], key: str) -> int | None:
    value = given.get(key)
    if value is not None and not _is_int(value):
        raise ConfigError(f"{key}: expected a token id, found {value!r}")
    return value

