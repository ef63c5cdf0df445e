"""Every way in which a checkpoint directory can be unusable or unsafe ends in one line that says so."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refengine.checkpoint import INDEX, open_checkpoint
from refengine.errors import CheckpointError, ConfigError
from refengine.model import forward
from refengine.weights import Weights
from tests.checkpoints import TINY, write_checkpoint
from tests.refengine.checkpoint_files import (
    FILE,
    NORM,
    Q_PROJ,
    changed,
    refused,
    sharded,
    write_index,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nothing")


def test_a_file_that_is_no_checkpoint_is_refused(directory: Path) -> None:
    assert "expected a checkpoint directory" in refused(directory / FILE)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / FILE).unlink()
    assert FILE in refused(directory)


def test_several_files_without_an_index_are_refused(directory: Path) -> None:
    sharded(directory)
    (directory / INDEX).unlink()
    assert INDEX in refused(directory)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '"llama"', "\udcff", "[" * 100_000], ids=lambda text: repr(text[:8])
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_json_that_is_none_is_refused_with_its_file(name: str, content: str, directory: Path) -> None:
    (directory / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert name in refused(directory)


def test_a_config_that_is_refused_is_named_with_its_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "qwen3"}), encoding="utf-8")
    text = refused(tmp_path, ConfigError)
    assert "config.json" in text
    assert "qwen3" in text


def test_end_tokens_that_are_refused_are_named_with_the_file_that_says_them(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": "</s>"}', encoding="utf-8")
    text = refused(directory, ConfigError)
    assert "generation_config.json" in text
    assert "</s>" in text


class Dangerous:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
def test_pickled_weights_are_refused_and_never_loaded(name: str, directory: Path, tmp_path: Path) -> None:
    (directory / FILE).unlink()
    (directory / name).write_bytes(pickle.dumps(Dangerous(tmp_path / "mark")))
    text = refused(directory)
    assert name in text
    assert "pickle" in text
    assert not (tmp_path / "mark").exists()


def test_an_index_that_names_a_pickle_is_refused_and_it_is_never_loaded(directory: Path, tmp_path: Path) -> None:
    weight_map = sharded(directory)
    (directory / "shard.bin").write_bytes(pickle.dumps(Dangerous(tmp_path / "mark")))
    write_index(directory, weight_map | {NORM: "shard.bin"})
    assert "shard.bin" in refused(directory)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "sub/../../outside.safetensors", "/outside.safetensors", 3, None]
)
def test_an_index_that_leaves_its_directory_is_refused_even_if_the_file_is_there(file: Any, directory: Path) -> None:
    weight_map = sharded(directory)
    outside = directory.parent / "outside.safetensors"
    shutil.copy(directory / weight_map[NORM], outside)
    (directory / "sub").mkdir()
    named = str(outside) if isinstance(file, str) and file.startswith("/") else file
    write_index(directory, weight_map | {NORM: named})
    text = refused(directory)
    assert repr(named) in text
    assert "leaves" in text


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"], ids=repr)
def test_an_index_without_a_weight_map_is_refused(weight_map: Any, directory: Path) -> None:
    sharded(directory)
    write_index(directory, weight_map)
    assert "weight_map" in refused(directory)


def test_a_missing_shard_is_named(directory: Path) -> None:
    shard = sharded(directory)[NORM]
    (directory / shard).unlink()
    assert shard in refused(directory)


def test_a_tensor_that_its_shard_does_not_have_is_named_with_the_shard(directory: Path) -> None:
    shard = sharded(directory)[NORM]
    tensors = load_file(directory / shard)
    del tensors[NORM]
    save_file(tensors, directory / shard)
    text = refused(directory)
    assert NORM in text
    assert shard in text


@pytest.mark.parametrize("name", [NORM, Q_PROJ, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(name: str, directory: Path) -> None:
    changed(directory, **{name: None})
    assert repr(name) in refused(directory)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (NORM, (41,)),
        (Q_PROJ, (40, 60)),
        (Q_PROJ, (60, 40, 1)),
        ("lm_head.weight", (66, 40)),
        ("model.embed_tokens.weight", (68, 40)),
        ("model.layers.0.self_attn.k_proj.weight", (60, 40)),
        ("model.layers.0.mlp.down_proj.weight", ()),
        ("model.layers.0.mlp.up_proj.weight", (0, 40)),
    ],
    ids=str,
)
def test_a_tensor_of_another_shape_than_the_config_says_is_named_with_both(
    name: str, shape: tuple[int, ...], directory: Path
) -> None:
    expected = load_file(directory / FILE)[name].shape
    changed(directory, **{name: np.ones(shape, np.float32)})
    text = refused(directory)
    assert name in text
    assert str(expected) in text
    assert str(shape) in text


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 66), ("num_hidden_layers", 4), ("num_key_value_heads", 3), ("attention_bias", True)],
)
def test_a_config_of_another_model_is_refused(key: str, value: Any, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(TINY | {key: value}), encoding="utf-8")
    refused(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.3.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ],
)
def test_a_tensor_that_the_config_denies_is_named(name: str, directory: Path) -> None:
    changed(directory, **{name: np.ones(40, np.float32)})
    assert name in refused(directory)


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_a_tied_model_with_another_head_is_refused(resident: bool, tmp_path: Path) -> None:
    # transformers 5 unties such a model with a warning, older versions tied it: nobody knows what was meant.
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / FILE)["model.embed_tokens.weight"]
    changed(tmp_path, **{"lm_head.weight": embedding + np.eye(*embedding.shape, dtype=np.float32)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        Weights.open(open_checkpoint(tmp_path), resident=resident)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8, np.bool_])
def test_a_tensor_that_is_no_float_is_named_with_its_dtype(dtype: type, directory: Path) -> None:
    changed(directory, **{Q_PROJ: np.ones((60, 40), dtype)})
    text = refused(directory)
    assert Q_PROJ in text
    assert "BF16" in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("name", [NORM, Q_PROJ, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(name: str, resident: bool, value: float, directory: Path) -> None:
    tensor = load_file(directory / FILE)[name]
    tensor.reshape(-1)[3] = value
    changed(directory, **{name: tensor})
    with pytest.raises(CheckpointError) as error:
        forward(
            Weights.open(open_checkpoint(directory), resident=resident),
            np.arange(3)[None],
            np.arange(3)[None],
        )
    assert name in str(error.value)
    assert "1 NaN or infinite" in str(error.value)


def test_a_weight_too_large_for_the_dtype_asked_for_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype=np.float64)
    changed(tmp_path, **{NORM: np.full(40, 1e300)})
    text = refused(tmp_path)
    assert NORM in text
    assert "float32" in text
    Weights.open(open_checkpoint(tmp_path), dtype=np.float64)
