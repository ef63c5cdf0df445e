"""What a config.json may say, and what is refused by name because it would change the mathematics."""

from typing import Any

import pytest

from refengine.config import MODEL_TYPES, NEUTRAL, Config, RopeParameters
from tests.checkpoints import TINY
from tests.refengine.config_files import MISTRAL, refused, without


def test_every_key_is_read_under_its_own_name() -> None:
    given = MISTRAL | {"bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16", "tie_word_embeddings": True}
    config = Config.from_dict(given)
    rope = RopeParameters("default", 10000.0)
    expected = without(given, "rope_theta") | {"eos_token_id": (2,), "rope_parameters": rope}
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.attention_bias, config.mlp_bias) == (False, False)


def test_biases_of_a_llama_are_read() -> None:
    config = Config.from_dict(TINY | {"attention_bias": True, "mlp_bias": True})
    assert (config.attention_bias, config.mlp_bias) == (True, True)


def test_a_config_without_head_dim_divides_hidden_size_by_the_heads() -> None:
    assert Config.from_dict(without(TINY, "head_dim") | {"hidden_size": 48}).head_dim == 8


def test_a_llama_without_num_key_value_heads_has_one_for_each_query_head() -> None:
    assert Config.from_dict(without(TINY, "num_key_value_heads")).num_key_value_heads == TINY["num_attention_heads"]


@pytest.mark.parametrize(("value", "expected"), [(None, ()), (7, (7,)), ([7], (7,)), ([7, 2, 9], (7, 2, 9))], ids=str)
def test_end_tokens_are_none_one_or_many(value: Any, expected: tuple[int, ...]) -> None:
    assert Config.from_dict(TINY | {"eos_token_id": value}).eos_token_id == expected


@pytest.mark.parametrize("value", [-1, "2", 2.0, True, [1, None], {"a": 1}], ids=str)
def test_end_tokens_that_are_no_token_ids_are_refused(value: Any) -> None:
    assert "eos_token_id" in refused(TINY | {"eos_token_id": value})


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    assert refused(without(TINY, key)).startswith(key)


def test_a_mistral_without_num_key_value_heads_is_refused() -> None:
    assert "num_key_value_heads" in refused(without(MISTRAL, "num_key_value_heads"))


@pytest.mark.parametrize("value", [0, -3, 2.5, "40", True, [40], None], ids=str)
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_size_that_is_no_positive_whole_number_is_named(key: str, value: Any) -> None:
    text = refused(TINY | {key: value})
    assert key in text
    assert "nothing" in text if value is None else repr(value) in text


@pytest.mark.parametrize(
    "value", [0, -1e-5, "1e-5", float("nan"), float("inf"), True, 10**400], ids=lambda v: str(v)[:9]
)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_number_that_is_not_positive_and_finite_is_named(key: str, value: Any) -> None:
    assert key in refused(TINY | {key: value})


@pytest.mark.parametrize("value", ["true", 2, [True]], ids=str)
@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
def test_a_switch_that_is_no_boolean_is_named(key: str, value: Any) -> None:
    assert key in refused(TINY | {key: value})


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "phi3", "gemma", "gemma2", "mixtral", "gpt2", "", None, 3, ["llama"]]
)
def test_other_families_are_refused_with_those_that_are_known(family: Any) -> None:
    text = refused(TINY | {"model_type": family})
    assert repr(family) in text
    assert all(known in text for known in MODEL_TYPES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_chunk_size", 8192),
        ("attention_multiplier", 0.1),
        ("attn_logit_softcapping", 50.0),
        ("clip_qkv", 8.0),
        ("embedding_multiplier", 12.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("logits_scaling", 8.0),
        ("no_rope_layers", [1, 1, 0]),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("partial_rotary_factor", 0.5),
        ("pretraining_tp", 2),
        ("qk_layernorm", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("query_pre_attn_scalar", 256),
        ("residual_multiplier", 0.22),
        ("rope_interleaved", True),
        ("use_qk_norm", True),
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("sliding_window", 16),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    ],
)
def test_a_key_that_changes_the_mathematics_is_refused_by_name_and_value(key: str, value: Any) -> None:
    text = refused(TINY | {key: value})
    assert text.startswith(key)
    assert "sliding_attention" in text if key == "layer_types" else repr(value) in text


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_a_key_that_changes_nothing_is_accepted(key: str) -> None:
    for value in NEUTRAL[key]:
        assert Config.from_dict(TINY | {key: value}) == Config.from_dict(TINY)


def test_a_key_that_says_nothing_about_the_mathematics_is_ignored() -> None:
    other = {
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.1,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    assert Config.from_dict(TINY | other) == Config.from_dict(TINY)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_a_bias_is_refused_where_the_family_has_none(key: str) -> None:
    assert refused(MISTRAL | {key: True}).startswith(key)


def test_key_value_heads_that_do_not_divide_the_query_heads_are_refused_with_both_numbers() -> None:
    text = refused(TINY | {"num_key_value_heads": 4})
    assert "num_key_value_heads" in text
    assert "6" in text
    assert "4" in text


def test_an_odd_head_dim_is_refused() -> None:
    assert "head_dim" in refused(TINY | {"head_dim": 7})


def test_a_hidden_size_that_the_heads_do_not_divide_needs_head_dim() -> None:
    assert "head_dim" in refused(without(TINY, "head_dim"))


@pytest.mark.parametrize(("window", "expected"), [(None, None), (1, 1), (4096, 4096)])
def test_a_mistral_window_is_a_number_of_tokens_or_null(window: int | None, expected: int | None) -> None:
    assert Config.from_dict(MISTRAL | {"sliding_window": window}).sliding_window == expected


def test_a_mistral_that_does_not_say_its_window_is_refused() -> None:
    assert refused(without(MISTRAL, "sliding_window")).startswith("sliding_window")


@pytest.mark.parametrize("window", [0, -1, 2.5, "4", True])
def test_a_window_that_is_no_number_of_tokens_is_refused(window: Any) -> None:
    assert "sliding_window" in refused(MISTRAL | {"sliding_window": window})


def test_layer_types_that_repeat_what_the_window_says_are_accepted() -> None:
    Config.from_dict(MISTRAL | {"layer_types": ["sliding_attention"] * 3})
    Config.from_dict(TINY | {"layer_types": ["full_attention"] * 3})
    assert refused(MISTRAL | {"layer_types": ["full_attention"] * 3}).startswith("layer_types")
