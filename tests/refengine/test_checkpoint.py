"""What is read from a checkpoint directory."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from refengine.checkpoint import open_checkpoint
from refengine.model import forward
from refengine.weights import Weights
from tests.checkpoints import TINY, write_checkpoint
from tests.refengine.checkpoint_files import FILE, NORM, Q_PROJ, changed, sharded


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, bfloat16])
def test_tensors_come_in_the_dtype_they_are_stored_in_and_weights_in_the_one_asked_for(
    dtype: type, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, dtype=dtype))
    stored = load_file(tmp_path / FILE)
    assert checkpoint.names == stored.keys()
    for name, array in stored.items():
        assert checkpoint.tensor(name).dtype == dtype
        assert checkpoint.shape(name) == array.shape
        np.testing.assert_array_equal(checkpoint.tensor(name), array)
    for asked in (np.float32, np.float64):
        for resident in (True, False):
            weights = Weights.open(checkpoint, asked, resident)
            np.testing.assert_array_equal(weights.norm_D, stored["model.norm.weight"].astype(asked))
            layer = list(weights.layers())[2]
            np.testing.assert_array_equal(layer.qkv_proj.weight_OI[:60], stored[Q_PROJ].astype(asked))
            assert {layer.qkv_proj.weight_OI.dtype, weights.norm_D.dtype} == {np.dtype(asked)}


def test_rows_are_a_slice_of_the_tensor(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    np.testing.assert_array_equal(checkpoint.rows(Q_PROJ, 7, 12), checkpoint.tensor(Q_PROJ)[7:12])


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_shards_compute_what_one_file_does(directory: Path, tmp_path: Path, resident: bool) -> None:
    sharded(shutil.copytree(directory, tmp_path / "shards"))
    one, other = (
        forward(Weights.open(open_checkpoint(path), resident=resident), np.arange(9)[None], np.arange(9)[None])
        for path in (directory, tmp_path / "shards")
    )
    np.testing.assert_array_equal(one, other)


def test_shards_may_be_links_to_files_elsewhere_as_in_a_model_cache(directory: Path, tmp_path: Path) -> None:
    shards = set(sharded(directory).values())
    (tmp_path / "blobs").mkdir()
    for shard in shards:
        (directory / shard).rename(tmp_path / "blobs" / shard)
        os.symlink(tmp_path / "blobs" / shard, directory / shard)
    assert open_checkpoint(directory).tensor(NORM).shape == (TINY["hidden_size"],)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_index_says_which_of_two_tensors_of_one_name_is_meant(which: int, directory: Path) -> None:
    weight_map = sharded(directory)
    name = sorted(weight_map)[which]  # in shard number `which`
    expected = load_file(directory / weight_map[name])[name]
    for shard in set(weight_map.values()) - {weight_map[name]}:
        save_file(load_file(directory / shard) | {name: expected + 1}, directory / shard)
    np.testing.assert_array_equal(open_checkpoint(directory).tensor(name), expected)


def test_one_safetensors_file_of_another_name_is_found(directory: Path) -> None:
    (directory / FILE).rename(directory / "consolidated.safetensors")
    assert NORM in open_checkpoint(directory).names


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": 7}, (7,)),
        (2, {"temperature": 0.6}, (2,)),
        (None, None, ()),
    ],
)
def test_end_tokens_are_those_of_the_generation_config_where_it_has_any(
    config: Any, generation: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    assert open_checkpoint(tmp_path).config.eos_token_id == expected


def test_a_stored_rotary_table_and_a_stored_copy_of_a_tied_head_change_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    before = Weights.open(open_checkpoint(tmp_path))
    copy = load_file(tmp_path / FILE)["model.embed_tokens.weight"]
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    changed(tmp_path, **{"lm_head.weight": copy}, **table)
    after = Weights.open(open_checkpoint(tmp_path))
    np.testing.assert_array_equal(*(next(iter(weights.head())).weight_OI for weights in (before, after)))
