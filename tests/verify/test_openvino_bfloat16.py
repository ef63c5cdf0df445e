"""bfloat16 that goes in and out of OpenVINO, which hands its bits over under the name of another type."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from ml_dtypes import bfloat16
from onnx import TensorProto, helper

from tests.verify.caused import small_model
from tests.verify.comparing import Compared
from tests.verify.faulty import rename_output, write_faulty
from verify.drive import run_candidate

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    return small_model(tmp_path_factory.mktemp("model"))


def in_bfloat16(model: onnx.ModelProto) -> None:
    """Declares logits, past and present in bfloat16, and computes in float32 as before."""
    for value in list(model.graph.output):
        rename_output(model, value.name, f"{value.name}/exact")
        model.graph.node.append(
            helper.make_node("Cast", [f"{value.name}/exact"], [value.name], to=TensorProto.BFLOAT16)
        )
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for value in model.graph.input:
        if not value.name.startswith("past"):
            continue
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
        for node in model.graph.node:
            node.input[:] = [f"{name}/exact" if name == value.name else name for name in node.input]
        model.graph.node.insert(
            0, helper.make_node("Cast", [value.name], [f"{value.name}/exact"], to=TensorProto.FLOAT)
        )


def test_logits_and_cache_are_those_of_float32_rounded(compared, tmp_path):
    narrow = compared.open(_written(compared, tmp_path / "narrow.onnx"), "openvino", FLOAT32)
    exact = compared.open(write_faulty(compared.checkpoint, tmp_path / "exact.onnx"), "openvino", FLOAT32)
    given, right = (run_candidate(one, [[3, 1, 4, 1, 5]], [(0,)], use_cache=True) for one in (narrow, exact))
    _assert_rounded(given.logits[0], right.logits[0])
    assert given.caches.keys() == right.caches.keys()
    for point, rows in given.caches.items():
        _assert_rounded(rows[0], right.caches[point][0])


def test_a_past_in_bfloat16_is_read_as_it_was_given(compared, tmp_path):
    """What is off is off by roundings of 8 bits, with the cache and without."""
    cells = compared.cells(_written(compared, tmp_path / "model.onnx"), "openvino", FLOAT32)
    assert {mode: cell.verdict for mode, cell in cells.items()} == {"off": "drift", "on": "drift"}
    assert cells["on"].noise_ratio.logits < 2 * cells["off"].noise_ratio.logits


def _assert_rounded(narrow: np.ndarray, exact: np.ndarray) -> None:
    assert narrow.dtype == bfloat16
    # To the nearest of 8 bits, or cut off after them: which of the two OpenVINO does is its own affair.
    np.testing.assert_allclose(narrow.astype(np.float32), exact, rtol=2**-7)


def _written(compared: Compared, path: Path) -> Path:
    return write_faulty(compared.checkpoint, path, edit=in_bfloat16)
