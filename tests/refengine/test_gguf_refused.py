"""GGUF files that cannot be used: each is refused in one line that names the file and what is wrong in it."""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from refengine.checkpoint import open_checkpoint
from refengine.errors import CheckpointError, ConfigError, InputError, MissingPackage
from refengine.gguf import GgufCheckpoint
from tests.refengine.gguf_files import (
    METADATA,
    H,
    N,
    V,
    gguf_name,
    llama3_divisors,
    weights_by_checkpoint_name,
    write_gguf,
)


@pytest.mark.parametrize(
    "table",
    [
        llama3_divisors(50000.0, 8.0, original=4096),
        np.full(H // 2, 0.5, np.float32),
        np.ones(H, np.float32) * 2,
    ],
    ids=["another-original-length", "below-one", "another-length"],
)
def test_a_table_of_no_known_settings_is_refused_by_name(tmp_path: Path, table: np.ndarray) -> None:
    path = write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": table})
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight"):
        GgufCheckpoint(path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"general__architecture": "qwen2"}, "qwen2"),
        ({"general__architecture": None}, "general.architecture"),
        ({"llama__embedding_length": None}, "llama.embedding_length"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon"),
        ({"llama__attention__head_count": [6, 6, 4]}, "llama.attention.head_count"),
        ({"llama__block_count": 0}, "llama.block_count"),
        ({"llama__rope__freq_base": -1.0}, "llama.rope.freq_base"),
        ({"llama__rope__freq_base": "ten"}, "llama.rope.freq_base"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama__attention__value_length": 32}, "llama.attention.value_length"),
        ({"llama__attention__head_count_kv": 4}, "num_key_value_heads"),
        ({"llama__attention__sliding_window": 128}, "llama.attention.sliding_window"),
        ({"llama__expert_count": 8}, "llama.expert_count"),
        ({"llama__attention__scale": 0.5}, "llama.attention.scale"),
        ({"llama__rope__scaling__type": "longrope"}, "longrope"),
        (
            {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0},
            "original_max_position_embeddings",
        ),
        ({"llama__rope__scaling__attn_factor": 1.2}, "llama.rope.scaling.attn_factor"),
        ({"split__count": 3}, "llama-gguf-split"),
    ],
)
def test_what_is_incomplete_or_changes_the_mathematics_is_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", **changed)
    with pytest.raises(InputError) as refused:
        GgufCheckpoint(path)
    assert named in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.0.ffn_gate_exps.weight", "blk.1.attn_q.scale"])
def test_a_tensor_that_a_plain_llama_has_not_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", extra={name: np.ones(H, np.float32)})
    with pytest.raises(CheckpointError, match=name):
        GgufCheckpoint(path)


def test_a_missing_embedding_is_named(tmp_path: Path) -> None:
    weights = weights_by_checkpoint_name()
    del weights["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        GgufCheckpoint(write_gguf(tmp_path / "model.gguf", weights))


def test_a_missing_tensor_is_named_when_it_is_read(tmp_path: Path) -> None:
    weights = weights_by_checkpoint_name()
    del weights["model.layers.1.mlp.up_proj.weight"]
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "model.gguf", weights))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        checkpoint.tensor("model.layers.1.mlp.up_proj.weight")


def test_a_projection_whose_rows_are_no_heads_is_refused(tmp_path: Path) -> None:
    weights = weights_by_checkpoint_name()
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name][: N * 2]
    path = write_gguf(tmp_path / "model.gguf", weights, llama__attention__head_count=24)
    with pytest.raises(CheckpointError, match="24 heads"):
        GgufCheckpoint(path).tensor(name)


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    weights = weights_by_checkpoint_name()
    del weights["model.layers.1.mlp.up_proj.weight"]
    writer_kind = Kind.Q8_K
    width = gguf.GGML_QUANT_SIZES[writer_kind][1]
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in METADATA.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    for name, tensor in weights.items():
        writer.add_tensor(gguf_name(name), tensor)
    writer.add_tensor("blk.1.ffn_up.weight", np.zeros((4, width), np.uint8), raw_dtype=writer_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*Q8_K"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"not a gguf file, just text" * 10], ids=len)
def test_what_is_no_gguf_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.gguf: not a whole GGUF file") as refused:
        GgufCheckpoint(path)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    words = [f"token {index}" for index in range(V)]
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_gguf(path, kind=Kind.Q4_0, tokenizer__ggml__tokens=words, tokenizer__ggml__token_type=[1] * V)
    return path.read_bytes()


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_wherever_it_ends(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, cut: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.gguf"
    path.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("key", ["tokenizer.ggml.token_type", "tokenizer.ggml.tokens"])
@pytest.mark.parametrize("count", [2**20, 2**62], ids=["a-million", "absurd"])
def test_a_list_that_claims_to_go_past_the_end_of_the_file_is_refused_at_once(
    tmp_path: Path, whole: bytes, key: str, count: int
) -> None:
    path = tmp_path / "model.gguf"
    at = whole.index(key.encode() + b"\t") + len(key) + 8  # after the key: a list, of what, and how many
    assert int.from_bytes(whole[at : at + 8], "little") == V
    path.write_bytes(whole[:at] + count.to_bytes(8, "little") + whole[at + 8 :])
    with pytest.raises(CheckpointError, match=rf"it has {len(whole)} bytes, its header speaks of byte \d+"):
        GgufCheckpoint(path)


@given(data=st.data())
def test_a_lying_header_is_refused_or_harmless_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    header = len(whole) - sum(tensor.nbytes for tensor in weights_by_checkpoint_name().values()) // 8
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(header, 6000)))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "lying.gguf"
    path.write_bytes(damaged)
    try:
        checkpoint = GgufCheckpoint(path)
    except InputError as error:
        said = str(error)
    else:
        said = str(checkpoint.config)
    assert "\n" not in said


def test_without_the_gguf_package_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    for module in [module for module in sys.modules if module.split(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match="install the gguf extra"):
        open_checkpoint(path)
