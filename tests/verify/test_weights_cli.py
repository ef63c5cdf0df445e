"""`inspect MODEL CANDIDATE`: what it prints, writes and returns."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.checkpoints import TINY
from tests.verify.commands import verify, verify_elsewhere

FIXTURES = Path(__file__).parents[2] / "fixtures"
TENSORS = 9 * TINY["num_hidden_layers"] + 3
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def damaged(small, tmp_path) -> Path:
    """An export with one norm of ones."""
    model = onnx.load(small.export)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == NORM)
    tensor.CopyFrom(numpy_helper.from_array(np.ones(TINY["hidden_size"], np.float32), NORM))
    onnx.save(model, tmp_path / "damaged.onnx")
    return tmp_path / "damaged.onnx"


def test_an_export_with_the_checkpoints_weights_gives_0_and_lists_no_tensor(small):
    done = verify("inspect", small.checkpoint, small.export)
    assert (done.code, done.err) == (0, "")
    assert done.first_lines[0] == f"weights: all {TENSORS} tensors are the checkpoint's, as exactly as they are stored"
    assert "layers" not in done.out


def test_a_changed_tensor_gives_1_and_is_listed_in_full(small, damaged):
    done = verify("inspect", small.checkpoint, damaged)
    assert done.code == 1
    assert done.first_lines[0] == f"weights: 1 of {TENSORS} tensors are not the checkpoint's"
    listed = " ".join(done.out.split("\n\n")[-1].split())
    assert listed.startswith(f"changed {NORM} in {NORM}; float32; error 0.")
    assert listed.endswith(f"numbers that differ: {TINY['hidden_size']}")


@pytest.mark.parametrize("exporter", ["genai-int4", "optimum-intel-int8"])
def test_the_listing_is_80_columns_wide_in_a_pipe_and_names_every_tensor(tiny, exporter):
    done = verify_elsewhere("inspect", FIXTURES / "tiny_llama", FIXTURES / "exports" / exporter)
    lines = done.out.splitlines()
    assert done.code == 0
    assert max(map(len, lines)) <= 80
    quantised = [line.split()[1] for line in lines if line.startswith("quantised  ") and "model." in line]
    assert set(quantised) >= {name for name in tiny.names if "_proj" in name}


def test_json_holds_what_the_table_shows(small, damaged, tmp_path):
    done = verify("inspect", small.checkpoint, damaged, "--json", tmp_path / "weights.json")
    written = json.loads((tmp_path / "weights.json").read_text(encoding="utf-8"))
    assert (done.code, written["is_faithful"]) == (1, False)
    assert written["counts"] == {"equal": TENSORS - 1, "changed": 1}
    (changed,) = (tensor for tensor in written["tensors"] if tensor["relation"] == "changed")
    assert (changed["name"], changed["stored_in"], changed["dtype"]) == (NORM, NORM, "float32")


def test_json_on_standard_output_takes_the_tables_place(small):
    done = verify("inspect", small.checkpoint, small.export, "--json", "-")
    assert json.loads(done.out)["counts"] == {"equal": TENSORS}


def test_without_the_checkpoint_it_says_what_the_export_is_as_before(small):
    done = verify("inspect", small.export)
    assert done.code == 0
    assert {line.split()[0] for line in done.out.splitlines() if line[:1].strip()} >= {"file", "sha256", "operators"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{export}", "--json", "-"), "--json: expected MODEL and CANDIDATE"),
        (("{checkpoint}", "{export}", "--runtime", "ort-cpu"), "--runtime: weights are read without a runtime"),
        (("{checkpoint}", "{checkpoint}"), "expected an export"),
        (("{export}", "{export}"), "expected a checkpoint directory or a .gguf file"),
        (("{checkpoint}", "{export}", "--json", "{checkpoint}"), "is a directory"),
    ],
)
def test_bad_use_gives_2_and_one_line(small, arguments, says):
    given = (text.format(export=small.export, checkpoint=small.checkpoint) for text in arguments)
    done = verify("inspect", *given)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert done.err.count("\n") == 1
