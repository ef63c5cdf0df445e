"""Where a tensor is that is not the checkpoint's, among others that are but rounded."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from refengine.checkpoint import open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.verify.caused import diagnosis_of
from tests.verify.comparing import Compared
from tests.verify.conftest import TEXTS, TINY_LLAMA
from verify.candidates.files import describe_candidate
from verify.expect import expected
from verify.own_weights import read_weights

LAYER = 5
EXPORT = TINY_LLAMA.parent / "exports" / "genai-int4" / "model.onnx"
Change = Callable[[np.ndarray], None]


@pytest.fixture(scope="module")
def compared() -> Compared:
    tokenizer = load_tokenizer(TINY_LLAMA)
    return Compared(open_checkpoint(TINY_LLAMA), [encode_prompt(tokenizer, TEXTS[0], chat=False)], 3)


def twice_a_scale(scales: np.ndarray) -> None:
    scales.flat[3] *= 2


def all_scales_less(scales: np.ndarray) -> None:
    scales *= 0.8


def damaged(path, projection: str, change: Change, accuracy_level: int) -> None:
    """An export with rounded weights, one of which has other scales."""
    model = onnx.load(EXPORT)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = accuracy_level
    (scales,) = (
        one
        for one in model.graph.initializer
        if f"layers.{LAYER}." in one.name and projection in one.name and "scale" in one.name
    )
    values = numpy_helper.to_array(scales).copy()
    change(values)
    scales.CopyFrom(numpy_helper.from_array(values, scales.name))
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("projection", "point", "change", "accuracy_level", "expect"),
    [
        ("qkv_proj", "self_attn.q_proj", twice_a_scale, 0, "float32"),
        ("down_proj", "mlp.down_proj", all_scales_less, 4, "auto"),
    ],
)
def test_a_damaged_tensor_is_found_among_rounded_ones(
    compared, tmp_path, projection, point, change, accuracy_level, expect
):
    path = tmp_path / "model.onnx"
    damaged(path, projection, change, accuracy_level)
    found = diagnosis_of(compared, compared.open(path), expectation=expected(expect)).location
    assert found is not None
    assert (found.layer, found.point, found.rung) == (LAYER, point, "weights")
    assert f"layers.{LAYER}/" in str(found.node)


def test_of_an_export_without_its_damaged_tensors_all_others_are_its_own(compared, tmp_path):
    path = tmp_path / "model.onnx"
    damaged(path, "down_proj", twice_a_scale, 0)
    own, _ = read_weights(compared.checkpoint, describe_candidate(path))
    rounded, name = own.without_damage(), f"model.layers.{LAYER}.mlp.down_proj.weight"
    for other in sorted(own.names):
        right = compared.checkpoint if other == name else own
        np.testing.assert_array_equal(rounded.tensor(other), right.tensor(other))
