"""How an export is written: its weights, its files, and what is refused before anything is."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from refengine import open_checkpoint
from refengine.checkpoint import Checkpoint
from refengine.errors import CheckpointError, InputError
from tests.checkpoints import write_checkpoint
from tests.exports import CPU, Exported, exported, prompts, run_in_steps, session
from verify.export import export_decoder
from verify.export.decoder import decoder_graph
from verify.export.files import ALIGNMENT, weight_reader, write_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Exported:
    """An export with a cache of the default checkpoint."""
    return exported(tmp_path_factory.mktemp("plain"))


def test_every_tensor_of_the_checkpoint_is_stored_once_under_its_name(tmp_path):
    given = exported(tmp_path, tie_word_embeddings=True, attention_bias=True, dtype=ml_dtypes.bfloat16)
    tensors = load_file(given.checkpoint.path / "model.safetensors")
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(given.path).graph.initializer}
    weights = {name: array for name, array in stored.items() if not name.startswith("/")}
    assert sorted(name.removesuffix(".T") for name in weights) == sorted(tensors)
    for name, array in weights.items():
        tensor = tensors[name.removesuffix(".T")].astype(np.float32)
        np.testing.assert_array_equal(array.T if name.endswith(".T") else array, tensor)


def test_weights_in_a_file_of_their_own_give_the_same_logits_to_the_bit(tmp_path, plain):
    graph = decoder_graph(plain.checkpoint.config, cache=True)
    write_model(graph, weight_reader(plain.checkpoint), tmp_path / "model.onnx", embedded_bytes=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert (tmp_path / "model.onnx").stat().st_size < plain.path.stat().st_size / 2
    onnx.checker.check_model(tmp_path / "model.onnx")
    paths = tmp_path / "model.onnx", plain.path
    outside, inside = (run_in_steps(session(path, CPU), *prompts(67), (9, 4)) for path in paths)
    assert all(np.array_equal(outside[name], inside[name]) for name in inside)


def test_external_weights_can_be_memory_mapped_where_they_stand(tmp_path, plain):
    graph = decoder_graph(plain.checkpoint.config, cache=False)
    write_model(graph, weight_reader(plain.checkpoint), tmp_path / "model.onnx", embedded_bytes=0)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    external = [{e.key: e.value for e in i.external_data} for i in model.graph.initializer if i.external_data]
    assert len(external) == len(plain.checkpoint.names)
    assert {entry["location"] for entry in external} == {"model.onnx_data"}
    assert all(int(entry["offset"]) % ALIGNMENT == 0 for entry in external)


@pytest.mark.parametrize("embedded_bytes", [2**31, 0], ids=["embedded", "external"])
def test_an_export_holds_a_few_tensors_at_a_time_and_never_the_model(tmp_path, embedded_bytes):
    sizes = {"hidden_size": 120, "intermediate_size": 280, "num_hidden_layers": 10}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", **sizes))
    graph = decoder_graph(checkpoint.config, cache=True)
    tensor, model = 4 * 120 * 280, sum(4 * int(np.prod(shape)) for shape in graph.weights.values())
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    write_model(graph, weight_reader(checkpoint), tmp_path / "model.onnx", embedded_bytes=embedded_bytes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 5 * tensor < model / 5


def test_an_export_replaces_one_that_is_there(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    (tmp_path / "model.onnx").write_bytes(b"what was here before")
    export_decoder(checkpoint, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx")


def damaged(directory: Path, change: Callable[[dict], object], **checkpoint: object) -> Checkpoint:
    """A checkpoint whose tensors `change` has altered."""
    path = write_checkpoint(directory / "checkpoint", **checkpoint)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return open_checkpoint(path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("embedded_bytes", [2**31, 0], ids=["embedded", "external"])
def test_a_weight_that_is_not_finite_is_named_and_what_was_there_stays(tmp_path, name, embedded_bytes):
    checkpoint = damaged(tmp_path, lambda tensors: tensors[name].flat.__setitem__(7, np.nan))
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"before")
    graph = decoder_graph(checkpoint.config, cache=True)
    with pytest.raises(CheckpointError, match=rf"{name}: expected finite weights, found 1 NaN"):
        write_model(graph, weight_reader(checkpoint), out, embedded_bytes=embedded_bytes)
    assert [(file.name, file.read_bytes()) for file in out.parent.iterdir()] == [("model.onnx", b"before")]


def test_a_weight_that_float32_cannot_hold_is_refused(tmp_path):
    checkpoint = damaged(tmp_path, lambda t: t["lm_head.weight"].flat.__setitem__(7, 1e300), dtype=np.float64)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .* as float32"):
        export_decoder(checkpoint, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


O_PROJ = "model.layers.2.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given.pop(f"{O_PROJ}.weight"), f"no tensor '{O_PROJ}.weight'"),
        (lambda given: given.update({f"{O_PROJ}.weight": np.ones((60, 40))}), r"expected shape \(40, 60\)"),
        (lambda given: given.update({f"{O_PROJ}.bias": np.ones(40)}), "a bias it denies"),
    ],
    ids=["missing", "misshapen", "denied"],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said):
        export_decoder(damaged(tmp_path, change), tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_rotary_frequencies_that_follow_the_length_are_refused(tmp_path):
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    directory = write_checkpoint(tmp_path / "checkpoint", rope_scaling=dynamic)
    with pytest.raises(InputError, match=r"'dynamic'.*expected 'default'"):
        export_decoder(open_checkpoint(directory), tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "expected a file to write, found a directory"),
        ("nowhere/model.onnx", "no such directory .*nowhere"),
        ("model.bin", r"expected a file name that ends in \.onnx"),
        (f"{'x' * 300}.onnx", "cannot be written"),
    ],
    ids=["a-directory", "no-directory", "another-suffix", "a-name-too-long"],
)
def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path, plain, out, said):
    with pytest.raises(InputError, match=said) as error:
        export_decoder(plain.checkpoint, tmp_path / out)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
