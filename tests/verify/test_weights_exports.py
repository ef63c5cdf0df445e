"""The embedded model's tensors in the exports that real exporters made of it."""

from pathlib import Path

import pytest

from verify.inspection import inspect_weights

EXPORTS = Path(__file__).parents[2] / "fixtures" / "exports"


@pytest.mark.parametrize("exporter", ["optimum", "genai", "dynamo", "optimum-intel"])
def test_real_exporters_kept_every_tensor_as_it_is(tiny, exporter):
    report = inspect_weights(tiny, EXPORTS / exporter)
    assert report.counts == {"equal": 9 * tiny.config.num_hidden_layers + 3}
    assert report.is_faithful


@pytest.mark.parametrize(
    ("exporter", "inexact", "storage"),
    [
        ("genai-fp16", "rounded", {("float16", None, None)}),
        ("genai-int4", "quantised", {("uint4", 4, 32)}),
        ("optimum-intel-int8", "quantised", {("uint8", 8, width) for width in (90, 96, 232)}),
    ],
)
def test_real_exporters_of_low_precision_rounded_every_tensor_honestly(tiny, exporter, inexact, storage):
    report = inspect_weights(tiny, EXPORTS / exporter)
    found = {(tensor.dtype, tensor.bits, tensor.block) for tensor in report.tensors if tensor.relation == inexact}
    assert (set(report.counts), found) == ({"equal", inexact}, storage)
    assert report.is_faithful
