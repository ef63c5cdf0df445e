"""Exports by ONNX Runtime's own quantisers: every weight is found, and is the checkpoint's to half a step."""

from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from refengine.checkpoint import open_checkpoint
from refengine.config import Config
from tests.checkpoints import TINY, write_checkpoint
from verify.candidates.onnx_file import describe
from verify.export import export_decoder
from verify.feeds import feed
from verify.inspection import inspect_weights
from verify.interface import interface_of
from verify.own_weights import notes_on_graph

MATRICES = 7 * TINY["num_hidden_layers"] + 1


def tiny_export(directory: Path):
    checkpoint = open_checkpoint(write_checkpoint(directory / "checkpoint"))
    export_decoder(checkpoint, directory / "model.onnx")
    return directory / "model.onnx", checkpoint


class Fed(CalibrationDataReader):
    """One prompt, to measure ranges on."""

    def __init__(self, model: Path, config: Config):
        file = describe(model)
        interface = interface_of(file.inputs, file.outputs).resolved(config)
        self._waiting = [feed(interface, np.array([[3, 1, 4, 1, 5, 9]]), np.arange(6)[None])]

    def get_next(self):
        return self._waiting.pop() if self._waiting else None


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [QuantType.QInt8, QuantType.QUInt8])
def test_onnxruntimes_own_dynamic_quantiser_is_honest(tmp_path, per_channel, dtype):
    model, checkpoint = tiny_export(tmp_path)
    quantize_dynamic(model, tmp_path / "q.onnx", per_channel=per_channel, weight_type=dtype)
    report = inspect_weights(checkpoint, tmp_path / "q.onnx")
    assert report.is_faithful
    assert report.counts["quantised"] == MATRICES + 1  # the embedding too


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_onnxruntimes_static_quantiser_is_honest(tmp_path, form, per_channel):
    model, checkpoint = tiny_export(tmp_path)
    ranges = {"op_types_to_quantize": ["MatMul"], "extra_options": {"MatMulConstBOnly": True}}
    how = {"quant_format": QuantFormat[form], "per_channel": per_channel, "weight_type": QuantType.QInt8}
    quantize_static(model, tmp_path / "q.onnx", Fed(model, checkpoint.config), **how, **ranges)
    report = inspect_weights(checkpoint, tmp_path / "q.onnx")
    assert report.is_faithful
    assert report.counts["quantised"] == MATRICES
    (note,) = notes_on_graph(describe(tmp_path / "q.onnx"))
    assert "rounds values on the way with fixed scales" in note
