"""Exports that ONNX Runtime cannot open or run: one line that says what, why and what to do."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from refengine.checkpoint import open_checkpoint
from refengine.config import Config
from refengine.errors import InputError
from refengine.tokens import left_padded
from tests.checkpoints import TINY, write_checkpoint
from tests.verify.handmade import GROUPED_QUERY, ONE_LAYER, H, K, N, V, grouped_query_decoder, repeating_decoder
from verify.candidates import Past
from verify.candidates.explain import explain_failure, in_words
from verify.candidates.ort import OrtCandidate
from verify.drive import run_candidate
from verify.errors import NoVerdict, RuntimeMissing
from verify.export import export_decoder
from verify.runtimes import runtime_named

RUNTIMES = ["ort-cpu", "ort-openvino"]
CONFIG = Config.from_dict(TINY)
EXPLANATION = f"{N} is num_attention_heads and {K} num_key_value_heads: its past was built with"


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("exports")
    checkpoint = open_checkpoint(write_checkpoint(directory / "checkpoint"))
    for name, cache in (("cached", True), ("uncached", False)):
        export_decoder(checkpoint, directory / f"{name}.onnx", cache=cache)
    return {name: directory / f"{name}.onnx" for name in ("cached", "uncached")}


def test_a_device_that_the_provider_runs_nothing_on_gives_no_verdict(exports):
    with pytest.raises(NoVerdict, match=r"Provider runs none of the \d+ nodes with device_type=ABACUS"):
        OrtCandidate.open(exports["cached"], "ort-openvino", {"device_type": "ABACUS"}, CONFIG)


@pytest.mark.parametrize("options", [{"device_type": "GPU.77"}, {"precision": "FP33"}])
def test_a_provider_that_rejects_its_options_is_not_replaced_by_the_cpu(exports, options):
    ((key, value),) = options.items()
    with pytest.raises(NoVerdict, match=f"OpenVINOExecutionProvider does not accept .*{key}={value}"):
        OrtCandidate.open(exports["cached"], "ort-openvino", options, CONFIG)


def test_an_option_that_the_provider_does_not_have_is_named(exports):
    with pytest.raises(NoVerdict, match=r"ort-openvino cannot open it: .*nonsense") as caught:
        OrtCandidate.open(exports["cached"], "ort-openvino", {"nonsense": "1"}, CONFIG)
    assert "\n" not in str(caught.value)


def test_an_export_of_another_model_is_refused_with_its_path_and_both_sides(exports):
    other = Config.from_dict(TINY | {"num_hidden_layers": 4, "vocab_size": 68})
    with pytest.raises(InputError) as caught:
        OrtCandidate.open(exports["cached"], "ort-cpu", {}, other)
    assert str(caught.value) == (
        f"{exports['cached']}: candidate has 3 layers, checkpoint 4; "
        "candidate has 67 tokens in its vocabulary, checkpoint 68: the export is of another model"
    )


def test_other_query_heads_are_found_in_an_export_that_declares_no_heads(exports):
    other = Config.from_dict(TINY | {"num_attention_heads": 8})
    with pytest.raises(InputError, match="candidate has 6 query heads, checkpoint 8: the export is of"):
        OrtCandidate.open(exports["uncached"], "ort-cpu", {}, other)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_cache_of_query_heads_is_explained_where_the_runtime_fails_on_it(tmp_path, runtime):
    path = repeating_decoder(tmp_path / "model.onnx", heads=N, kv_heads="kv_heads")
    candidate = OrtCandidate.open(path, runtime, {}, ONE_LAYER)
    held = {f"past_key_values.0.{kind}": np.zeros((1, K, 2, H), np.float32) for kind in ("key", "value")}
    with pytest.raises(NoVerdict, match=f"{runtime} failed: .*{EXPLANATION}") as caught:
        candidate.run(np.array([[3]]), np.array([[2]]), Past(held, np.array([[0, 1]])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_cache_of_query_heads_is_explained_where_an_empty_past_lets_it_pass(tmp_path, runtime):
    path = repeating_decoder(tmp_path / "model.onnx", heads=N, kv_heads="kv_heads")
    candidate = OrtCandidate.open(path, runtime, {}, ONE_LAYER)
    with pytest.raises(NoVerdict, match=f"{runtime} failed: .*{EXPLANATION}"):
        run_candidate(candidate, [[1, 2, 3]], [(0,)] * 2, use_cache=True)


def test_a_failing_run_is_told_once_and_not_on_the_error_stream(tmp_path, capfd):
    path = repeating_decoder(tmp_path / "model.onnx", heads=K)
    candidate = OrtCandidate.open(path, "ort-cpu", {}, ONE_LAYER)
    with pytest.raises(NoVerdict, match=r"ort-cpu failed: .*/lookup.* indices element out of data bounds"):
        candidate.run(*left_padded([[V]]))
    assert capfd.readouterr() == ("", "")


def test_a_bfloat16_cache_gives_no_verdict(tmp_path):
    path = repeating_decoder(tmp_path / "model.onnx", heads=K, dtype=TensorProto.BFLOAT16)
    with pytest.raises(NoVerdict, match=r"past_key_values.0.key is bfloat16.*export it with float32"):
        OrtCandidate.open(path, "ort-cpu", {}, ONE_LAYER)


def test_a_graph_that_does_not_hang_together_is_bad_input(tmp_path):
    model = onnx.load(repeating_decoder(tmp_path / "model.onnx", heads=K))
    model.graph.node[0].input[0] = "nowhere"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"ort-cpu cannot open it: .*nowhere"):
        OrtCandidate.open(tmp_path / "model.onnx", "ort-cpu", {}, ONE_LAYER)


def test_an_operator_that_this_runtime_does_not_have_gives_no_verdict(tmp_path):
    model = onnx.load(repeating_decoder(tmp_path / "model.onnx", heads=K))
    model.graph.node[0].op_type = "Gatherer"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(NoVerdict, match=r"ort-cpu cannot open it: .*No Op registered for Gatherer"):
        OrtCandidate.open(tmp_path / "model.onnx", "ort-cpu", {}, ONE_LAYER)


def test_an_opset_that_this_runtime_does_not_know_gives_no_verdict(tmp_path):
    model = onnx.load(repeating_decoder(tmp_path / "model.onnx", heads=K))
    model.opset_import[0].version = 999
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(NoVerdict, match=r"ort-cpu cannot open it: .*[Oo]pset 999"):
        OrtCandidate.open(tmp_path / "model.onnx", "ort-cpu", {}, ONE_LAYER)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_is_not_installed_is_named_with_the_extra_to_install(exports, monkeypatch, runtime):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not there
    with pytest.raises(RuntimeMissing, match=r'cannot be imported.*pip install "tokenproof\[onnxruntime\]"$'):
        OrtCandidate.open(exports["cached"], runtime, {}, CONFIG)


@pytest.mark.parametrize("name", ["CUDAExecutionProvider", "DmlExecutionProvider", "Nonsense"])
def test_a_provider_that_is_not_installed_is_refused_with_those_that_are(exports, name):
    runtime = f"ort:{name}"
    with pytest.raises(RuntimeMissing) as caught:
        runtime_named(runtime)(exports["cached"], runtime, {}, CONFIG)
    there = ", ".join(onnxruntime.get_available_providers())
    assert f"{runtime}: the installed onnxruntime {onnxruntime.__version__} has {there}, no {name}" in str(caught.value)


@pytest.mark.parametrize("name", ["ort:", "ort", "tensorrt", ""])
def test_a_name_that_no_runtime_can_have_is_refused_with_those_that_can(name):
    with pytest.raises(InputError, match=r"expected ort-cpu, .* or ort: and a provider .*, found '"):
        runtime_named(name)


def test_an_attribute_that_this_runtime_does_not_know_gives_no_verdict_and_is_named(tmp_path):
    """As the model builder writes windows for newer releases: the attribute stands at the end of a long message."""
    model = onnx.load(grouped_query_decoder(tmp_path / "model.onnx"))
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    attention.attribute.append(onnx.helper.make_attribute("a_cache_of_tomorrow", 1))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(NoVerdict, match=r"ort-cpu cannot open it: .*a_cache_of_tomorrow"):
        OrtCandidate.open(tmp_path / "model.onnx", "ort-cpu", {}, GROUPED_QUERY)


@pytest.mark.parametrize(
    "message",
    [
        "Non concat axis dimensions must match: Axis 1 has mismatched dimensions of 2 and 6",
        "Shape inference input shapes {{1,6,4,10},{1,2,1,10}} Argument shapes are inconsistent",
        "Got invalid dimensions for input: past_key_values.9.value for these indices index: 1 Got: 6 Expected: 2",
        "Attempting to broadcast an axis by a dimension other than 1. 6 by 2",
        "Sizes of tensors must match except in dimension 2. Expected size 6 but got size 2 for tensor number 1",
        "All inputs to Concat must have same shape. Input 1 dim 1 has shape mismatch: 6 vs 2",
    ],
)
def test_query_heads_met_by_key_value_heads_are_recognised_in_every_wording(message):
    assert explain_failure(message, CONFIG).startswith(EXPLANATION)


@pytest.mark.parametrize(
    "message",
    [
        "Non concat axis dimensions must match: Axis 6 has mismatched dimensions of 2 and 5",
        "running node /model/layers.6/Concat_2 : 2 : FAIL",
        "Got: 6 Expected: 4",
        "shapes {1,6,4,10} and {1,6,2,10}",
        "",
    ],
)
def test_other_numbers_in_a_message_are_not_taken_for_heads(message):
    assert explain_failure(message, CONFIG) == ""


def test_nothing_is_explained_when_query_and_key_value_heads_are_as_many():
    alike = Config.from_dict(TINY | {"num_attention_heads": 2})
    assert explain_failure("Got: 2 Expected: 2", alike) == ""


def test_an_ir_is_refused_with_the_runtime_that_runs_it():
    ir = Path(__file__).parents[2] / "fixtures" / "exports" / "optimum-intel" / "openvino_model.xml"
    with pytest.raises(InputError, match=r"expected an \.onnx file, as an OpenVINO IR is run by --runtime openvino"):
        OrtCandidate.open(ir, "ort-cpu", {}, CONFIG)


@pytest.mark.parametrize(
    "message",
    [
        "Unrecognized attribute: sliding_window_cache for operator GroupQueryAttention",
        "sliding_window_cache: KV cache capacity (0) must be at least local_window_size (13).",
    ],
)
def test_a_cache_that_goes_round_is_explained_with_what_can_run_it(message):
    assert "compare with --runtime genai, or build it with" in explain_failure(message, CONFIG)


def test_a_head_size_worked_out_from_the_hidden_size_is_recognised():
    explained = explain_failure("Got: 6 Expected: 10", CONFIG)
    assert explained.startswith("6 is hidden_size / num_attention_heads and 10 the checkpoint's head_dim")


def test_a_message_is_cut_to_one_short_line_and_its_explanation_kept():
    message = "[ONNXRuntimeError] : 1 : FAIL : Node failed:\n\n Got: 6\n Expected: 2 " + 1000 * "x" + " the reason"
    line = in_words(message, CONFIG)
    assert line.startswith("Node failed: Got: 6 Expected: 2 xxx")
    assert "xxx the reason: " in line
    assert "\n" not in line
    assert len(line) < 800
    assert EXPLANATION in line
