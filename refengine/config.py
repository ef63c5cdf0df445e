"""What a `config.json` says about the mathematics, and what is refused because it would change it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refengine.config_values import Given, flag, found, is_whole, number, one_of, token_or_none, whole_number
from refengine.errors import ConfigError
from refengine.rope_config import RopeParameters, rope_parameters_of

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
    def from_dict(cls, given: Given) -> "Config":
        """The configuration that a parsed `config.json` describes.

        Raises:
            ConfigError: a needed key is missing, a value is out of range or contradicts another, or the mathematics
                asked for is not supported.
        """
        model_type = _model_type(given)
        _refuse_what_changes_the_mathematics(given)
        heads, hidden_size = whole_number(given, "num_attention_heads"), whole_number(given, "hidden_size")
        head_dim = _head_dim(given, hidden_size, heads)
        return cls(
            model_type=model_type,
            vocab_size=whole_number(given, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=whole_number(given, "intermediate_size"),
            num_hidden_layers=whole_number(given, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_key_value_heads(given, model_type, heads),
            head_dim=head_dim,
            rms_norm_eps=number(given, "rms_norm_eps"),
            max_position_embeddings=whole_number(given, "max_position_embeddings"),
            rope_parameters=rope_parameters_of(given, head_dim),
            hidden_act=_hidden_act(given),
            attention_bias=_bias(given, "attention_bias", model_type),
            mlp_bias=_bias(given, "mlp_bias", model_type),
            tie_word_embeddings=flag(given, "tie_word_embeddings"),
            sliding_window=_sliding_window(given, model_type),
            eos_token_id=end_tokens(given.get("eos_token_id")),
            bos_token_id=token_or_none(given, "bos_token_id"),
            dtype=str(given.get("dtype") or given.get("torch_dtype") or "float32"),
        )


def end_tokens(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as it stands in a JSON file (absent, one id, or a list of them) as a tuple."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(is_whole(token) and token >= 0 for token in listed):
        raise ConfigError(f"eos_token_id: expected a token id or a list of them, found {found(value)}")
    return tuple(listed)


def _model_type(given: Given) -> str:
    model_type = given.get("model_type")
    if not one_of(model_type, MODEL_TYPES):
        raise ConfigError(
            f"model_type: expected one of {', '.join(MODEL_TYPES)}, found {repr(model_type)[:80]}: this "
            "family is not supported"
        )
    return str(model_type)


def _refuse_what_changes_the_mathematics(given: Given) -> None:
    for key, neutral in NEUTRAL.items():
        if key in given and not one_of(given[key], neutral):
            raise ConfigError(
                f"{key}: found {found(given[key])}, which changes the mathematics and is not supported; "
                f"expected {neutral[-1]!r} or no such key"
            )
    kind = "full_attention" if given.get("sliding_window") is None else "sliding_attention"
    layer_types = given.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or any(layer != kind for layer in layer_types)):
        raise ConfigError(
            f"layer_types: expected {kind!r} in every layer, found {found(layer_types)}; other mixtures are "
            "not supported"
        )


def _key_value_heads(given: Given, model_type: str, heads: int) -> int:
    if given.get("num_key_value_heads") is None and model_type == "llama":
        return heads  # checkpoints older than grouped-query attention do not have the key
    kv_heads = whole_number(given, "num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads: expected a divisor of num_attention_heads {heads}, found {kv_heads}")
    return kv_heads


def _head_dim(given: Given, hidden_size: int, heads: int) -> int:
    if given.get("head_dim") is not None:
        head_dim = whole_number(given, "head_dim")
    elif hidden_size % heads:
        raise ConfigError(
            f"head_dim: not given, and hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    else:
        head_dim = hidden_size // heads
    if head_dim % 2:
        raise ConfigError(f"head_dim: expected an even number (rotary embedding turns pairs), found {head_dim}")
    return head_dim


def _hidden_act(given: Given) -> str:
    if not one_of(given.get("hidden_act", "silu"), ("silu", "swish")):
        raise ConfigError(f"hidden_act: expected 'silu', found {repr(given['hidden_act'])[:80]}")
    return "silu"


def _bias(given: Given, key: str, model_type: str) -> bool:
    if flag(given, key) and model_type != "llama":
        raise ConfigError(f"{key}: found true, but a {model_type} has none; expected false")
    return flag(given, key)


def _sliding_window(given: Given, model_type: str) -> int | None:
    if model_type == "mistral" and "sliding_window" not in given:
        # transformers would silently take 4096 here, other readers full attention: nobody can know what was meant.
        raise ConfigError(
            "sliding_window: missing; a mistral config must say a number of tokens, or null for full attention"
        )
    if given.get("sliding_window") is None:
        return None
    if model_type == "llama":
        raise ConfigError(
            f"sliding_window: found {found(given['sliding_window'])}, but a llama attends to everything; "
            "expected null or model_type 'mistral'"
        )
    return whole_number(given, "sliding_window")
