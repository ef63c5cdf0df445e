"""GGUF files read as checkpoints: names, row order, values and configuration of the original."""

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from refengine.checkpoint import open_checkpoint
from refengine.config import Config
from refengine.gguf import GgufCheckpoint
from refengine.weights import Weights
from tests.refengine.gguf_files import (
    LAYERS,
    D,
    F,
    H,
    K,
    N,
    V,
    llama3_divisors,
    weights_by_checkpoint_name,
    write_gguf,
)

QUANTISED = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)

CONFIG_JSON: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}


@pytest.fixture(scope="module", params=QUANTISED, ids=lambda kind: kind.name)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GgufCheckpoint:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return GgufCheckpoint(write_gguf(path, kind=request.param))


def test_a_float32_file_gives_back_every_tensor_under_its_checkpoint_name(tmp_path: Path) -> None:
    weights = weights_by_checkpoint_name()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", weights))
    assert checkpoint.names == weights.keys()
    for name, expected in weights.items():
        assert checkpoint.shape(name) == expected.shape, name
        assert checkpoint.tensor(name).dtype == np.float32, name
        np.testing.assert_array_equal(checkpoint.tensor(name), expected, err_msg=name)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, np.float16), (Kind.BF16, ml_dtypes.bfloat16)])
def test_half_precision_keeps_its_dtype(tmp_path: Path, kind: Kind, dtype: Any) -> None:
    weights = weights_by_checkpoint_name()
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "model.gguf", weights, kind))
    for name, expected in weights.items():
        expected = expected.astype(dtype) if expected.ndim == 2 else expected
        assert checkpoint.tensor(name).dtype == expected.dtype
        np.testing.assert_array_equal(checkpoint.tensor(name), expected, err_msg=name)
    assert checkpoint.config.dtype == np.dtype(dtype).name


def test_quantised_tensors_are_dequantised_into_checkpoint_row_order(quantised: GgufCheckpoint) -> None:
    for name, original in weights_by_checkpoint_name().items():
        kind = quantised._tensor(name).tensor_type
        # Blocks lie within rows, so quantising commutes with moving rows.
        expected = dequantize(quantize(original, kind), kind)
        np.testing.assert_array_equal(quantised.tensor(name), expected, err_msg=name)
        assert quantised.tensor(name).dtype == np.float32


@given(st.data())
def test_rows_are_the_rows_of_the_whole_tensor(quantised: GgufCheckpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(quantised.names)))
    height = quantised.shape(name)[0]
    start = data.draw(st.integers(0, height))
    stop = data.draw(st.integers(start, height))
    np.testing.assert_array_equal(quantised.rows(name, start, stop), quantised.tensor(name)[start:stop])


def test_reading_a_few_rows_dequantises_only_those(tmp_path: Path) -> None:
    weights = weights_by_checkpoint_name()
    weights["model.embed_tokens.weight"] = np.ones((8192, D), np.float32)
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "model.gguf", weights, Kind.Q8_0))
    tracemalloc.start()
    checkpoint.rows("model.embed_tokens.weight", 4000, 4008)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8192 * D * 4 / 50


def test_biases_are_unpermuted_like_their_weights(tmp_path: Path) -> None:
    weights = weights_by_checkpoint_name(biases=True)
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "model.gguf", weights))
    assert checkpoint.config.attention_bias
    assert checkpoint.config.mlp_bias
    for name in weights:
        np.testing.assert_array_equal(checkpoint.tensor(name), weights[name], err_msg=name)


def test_the_metadata_become_the_configuration_of_the_original(tmp_path: Path) -> None:
    assert GgufCheckpoint(write_gguf(tmp_path / "model.gguf")).config == Config.from_dict(CONFIG_JSON)


def test_a_file_with_its_own_head_is_not_tied(tmp_path: Path) -> None:
    weights = weights_by_checkpoint_name(head=True)
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "model.gguf", weights))
    assert not checkpoint.config.tie_word_embeddings
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), weights["lm_head.weight"])


def test_the_forward_pass_accepts_every_tensor_that_the_file_gives(tmp_path: Path) -> None:
    assert Weights.open(GgufCheckpoint(write_gguf(tmp_path / "model.gguf", kind=Kind.Q4_1)), np.float64)


def test_head_sizes_and_key_heads_default_as_the_format_says(tmp_path: Path) -> None:
    square: dict[str, Any] = {
        f"llama__attention__{key}": None for key in ("head_count_kv", "key_length", "value_length")
    }
    config = GgufCheckpoint(
        write_gguf(
            tmp_path / "model.gguf",
            llama__attention__head_count=4,
            llama__rope__dimension_count=None,
            **square,
        )
    ).config
    assert (config.num_key_value_heads, config.head_dim) == (4, D // 4)


def test_every_end_token_of_the_file_is_honoured(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tokenizer__ggml__eot_token_id=5, tokenizer__ggml__eom_token_id=2)
    assert GgufCheckpoint(path).config.eos_token_id == (2, 5)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"llama__rope__freq_base": None}, {"rope_theta": 10000.0}),
        (
            {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0},
            {"rope_type": "default"},
        ),
        (
            {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama__rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama__rope__scaling__factor": 0.0}, {"rope_type": "default"}),
        ({"llama__rope__scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 4.0,
                "llama__rope__scaling__original_context_length": 128,
                "llama__rope__scaling__yarn_beta_fast": 16.0,
                "llama__rope__scaling__attn_factor": 1.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling_is_read(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    rope = GgufCheckpoint(write_gguf(tmp_path / "model.gguf", **metadata)).config.rope_parameters
    assert {key: getattr(rope, key) for key in expected} == expected


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("factor", [8.0, 32.0, 16.0])
def test_a_table_of_frequency_divisors_becomes_the_llama3_settings(tmp_path: Path, theta: float, factor: float) -> None:
    table = llama3_divisors(theta, factor)
    assert factor in table
    path = write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": table}, llama__rope__freq_base=theta)
    checkpoint = GgufCheckpoint(path)
    rope = checkpoint.config.rope_parameters
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("llama3", factor, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)
    assert "rope_freqs.weight" not in checkpoint.names


def test_a_table_of_ones_is_no_scaling(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": np.ones(H // 2, np.float32)})
    assert GgufCheckpoint(path).config.rope_parameters.rope_type == "default"


def test_a_value_that_is_the_same_for_every_layer_may_be_a_list(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama__attention__head_count=[N] * LAYERS)
    assert GgufCheckpoint(path).config.num_attention_heads == N
