"""Low-precision arithmetic: the noise that it makes, and what is found in spite of it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.tokens import left_padded
from refengine.trace import Recorder
from refengine.weights import Weights
from tests.verify.commands import verify
from tests.verify.comparing import Compared
from tests.verify.faulty import (
    give_layers_in_order_of_text,
    interleaved_rotation,
    only_in,
    scaled_attention,
    tiled_heads,
    windowed,
    write_faulty,
)
from verify.candidates.files import describe_candidate
from verify.drive import CandidateRun, run_candidate
from verify.expect import EXACT, expectations, expected, joined
from verify.inspection import exported_checkpoint
from verify.judge import judge
from verify.report.result import NoiseRatio, Verdict
from verify.request import Request, request_for
from verify.truth.arithmetic import ARITHMETICS, Arithmetic, quantised
from verify.truth.noise import rms
from verify.truth.reference import Reference, ReferenceRun

FIXTURES = Path(__file__).parents[2] / "fixtures"
EXPORTS = FIXTURES / "exports"
PROMPTS = [[5, 17, 44, 80, 3, 9, 121], [200, 31, 7], [64, 65, 66, 67, 68]]
NEW_TOKENS = 11
TINY = Compared(open_checkpoint(FIXTURES / "tiny_llama"), PROMPTS, NEW_TOKENS)
BFLOAT16 = {"INFERENCE_PRECISION_HINT": "bf16"}
ROPE = TINY.checkpoint.config.rope_parameters
NARROW = pytest.mark.parametrize("arithmetic", [ARITHMETICS["bfloat16"], ARITHMETICS["float16"]], ids=lambda x: x.name)
MODES = pytest.mark.parametrize("use_cache", [False, True], ids=["off", "on"])

some = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 70)),
    elements=st.integers(-(10**6), 10**6).map(lambda thousandths: np.float32(thousandths / 1000)),
)


@cache
def reference(name: str, weights_of: Path | None = None) -> ReferenceRun:
    """The reference with this expectation's arithmetic and cache, on the checkpoint's weights or an export's."""
    expectation = expected(name)
    assert expectation is not None
    checkpoint = TINY.checkpoint
    if weights_of is not None:
        checkpoint = exported_checkpoint(checkpoint, describe_candidate(weights_of))
    return Reference(checkpoint, scheme=expectation.scheme, arithmetic=expectation.arithmetic).run(PROMPTS, NEW_TOKENS)


@cache
def ran(path: Path, use_cache: bool, runtime: str, options: tuple[tuple[str, str], ...], fed: str) -> CandidateRun:
    """What an export gives where these tokens are fed."""
    candidate = TINY.open(path, runtime, dict(options))
    precision = "INFERENCE_PRECISION_HINT"
    if dict(options).get(precision, "f32") != candidate.settings.effective.get(precision, "f32"):
        pytest.skip("OpenVINO has no bfloat16 on this processor")
    schedule = request_for(candidate, Request(PROMPTS, NEW_TOKENS)).schedule
    return run_candidate(candidate, PROMPTS, schedule, use_cache=use_cache, forced=json.loads(fed))


def judged(
    path: Path,
    reference: ReferenceRun,
    use_cache: bool,
    runtime: str = "openvino",
    options: Mapping[str, str] = BFLOAT16,
) -> tuple[Verdict, NoiseRatio]:
    """The verdict on an export that is fed the reference's tokens."""
    found = ran(path, use_cache, runtime, tuple(options.items()), json.dumps(reference.tokens))
    verdict, _, noise = judge(found, reference)
    return verdict, noise


@given(some, st.sampled_from([1, 8, 32]))
def test_int8_is_off_by_half_a_step_of_its_block_at_most(x_RI, block):
    found_RI = quantised(x_RI, block)
    for start in range(0, x_RI.shape[1], block):
        part = slice(start, start + block)
        step_R1 = np.abs(x_RI[:, part]).max(axis=1, keepdims=True) / 127
        assert (np.abs(found_RI[:, part] - x_RI[:, part]) <= step_R1 * (0.5 + 1e-4)).all()


def test_int8_keeps_the_largest_of_each_block_and_zeros():
    x_RI = np.array([[1.0, -127.0, 0.0, 0.25, 0.5]], np.float32)
    np.testing.assert_array_equal(quantised(x_RI, 3), [[1.0, -127.0, 0.0, np.float32(64) * np.float32(0.5 / 127), 0.5]])
    np.testing.assert_array_equal(quantised(np.zeros((2, 7), np.float32), 4), 0)


@NARROW
def test_what_goes_from_operator_to_operator_is_narrow_and_logits_are_not(arithmetic):
    recorder = Recorder()
    ops = next(iter(arithmetic.orders(100).values()))
    token_ids_BT, positions_BT = left_padded(PROMPTS)
    weights = arithmetic.weights(TINY.checkpoint)
    logits_BTV = forward(weights, token_ids_BT, positions_BT, KVCache(weights.config, 3), ops=ops, trace=recorder)
    assert logits_BTV.dtype == np.float32
    assert not np.array_equal(logits_BTV, logits_BTV.astype(arithmetic.dtype))
    for point, value in recorder.arrays.items():
        if point != "lm_head":
            np.testing.assert_array_equal(value, value.astype(arithmetic.dtype), err_msg=point)
        if point.endswith(".residual"):
            assert value.dtype == arithmetic.dtype, point


@NARROW
def test_weights_are_rounded_once(arithmetic):
    exact, rounded = Weights.open(TINY.checkpoint, np.float32), arithmetic.weights(TINY.checkpoint)
    for wide, narrow in zip(exact.layers(), rounded.layers(), strict=True):
        expected_OI = wide.down_proj.weight_OI.astype(arithmetic.dtype)
        np.testing.assert_array_equal(narrow.down_proj.weight_OI, expected_OI.astype(np.float32))
        np.testing.assert_array_equal(narrow.input_layernorm_D, wide.input_layernorm_D)


@NARROW
def test_no_order_of_a_narrow_float_repeats_the_noise_of_another(arithmetic):
    """Orders of summing alone would: their errors in bfloat16 correlate by 0.95 and more, as if they were one draw."""
    token_ids_BT, positions_BT = left_padded(PROMPTS)
    exact = forward(Weights.open(TINY.checkpoint, np.float64), token_ids_BT, positions_BT)[positions_BT >= 0]
    weights = arithmetic.weights(TINY.checkpoint)
    errors = [
        (forward(weights, token_ids_BT, positions_BT, ops=ops)[positions_BT >= 0] - exact).ravel()
        for ops in arithmetic.orders(100).values()
    ]
    correlations = np.corrcoef(errors)[np.triu_indices(len(errors), 1)]
    assert correlations.max() < 0.9
    sizes = [rms(error) for error in errors]
    assert max(sizes) < 3 * min(sizes)


def test_the_noise_grows_with_the_size_of_a_rounding():
    sizes = {name: rms(reference(name).logits.noise.rms_P) for name in ("float32", "float16", "bfloat16")}
    assert sizes["float16"] > 500 * sizes["float32"]
    assert 4 < sizes["bfloat16"] / sizes["float16"] < 16


@MODES
@pytest.mark.parametrize("export", ["optimum-intel", "optimum"])
def test_bfloat16_on_openvino_is_equal_in_its_unit_and_drifts_in_that_of_float32(export, use_cache):
    verdict, noise = judged(EXPORTS / export, reference("bfloat16"), use_cache)
    assert verdict == "equal"
    assert noise.logits < 1.5
    verdict, noise = judged(EXPORTS / export, reference("float32"), use_cache)
    assert verdict in ("drift", "mismatch")
    assert noise.logits > 1000


@MODES
def test_bfloat16_with_a_quantised_cache_is_equal_to_the_reference_with_both(use_cache):
    options = BFLOAT16 | {"KV_CACHE_PRECISION": "u8"}
    both = expected("bfloat16+ov-u8")
    assert TINY.open(EXPORTS / "optimum-intel", "openvino", options).expectation == both
    name = both.name if use_cache else both.without_cache.name
    verdict, noise = judged(EXPORTS / "optimum-intel", reference(name), use_cache, options=options)
    assert (verdict, noise.logits < 1.5) == ("equal", True)


FAULTS: dict[str, dict[str, Any]] = {
    "another rope_theta": {"config": {"rope_parameters": replace(ROPE, rope_theta=20000.0)}},
    "rotation interleaved in one layer": {"modules": only_in([5], "rotate", interleaved_rotation)},
    "key-value heads tiled": {"modules": {"repeat_kv": tiled_heads}},
    "a window": {"modules": {"attention_mask": windowed(8)}},
    "another scale of attention": {"modules": {"attend": scaled_attention(1.1)}},
    "another rms_norm_eps": {"config": {"rms_norm_eps": 1e-3}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_top_of_bfloat16_is_found(tmp_path, fault):
    path = write_faulty(TINY.checkpoint, tmp_path / "model.onnx", **FAULTS[fault])
    assert judged(path, reference("bfloat16"), use_cache=True)[0] in ("drift", "mismatch")


def test_a_mistake_with_the_cache_on_top_of_bfloat16_is_found_with_the_cache_alone(tmp_path):
    path = write_faulty(TINY.checkpoint, tmp_path / "model.onnx", edit=give_layers_in_order_of_text)
    verdicts = [judged(path, reference("bfloat16"), use_cache)[0] for use_cache in (False, True)]
    assert verdicts == ["equal", "mismatch"]


@MODES
def test_a_float16_graph_on_onnxruntime_is_equal_in_its_unit_and_drifts_in_that_of_float32(use_cache):
    export = EXPORTS / "genai-fp16"
    verdict, noise = judged(export, reference("float16"), use_cache, "ort-cpu", {})
    assert (verdict, noise.logits < 1.5) == ("equal", True)
    assert judged(export, reference("float32"), use_cache, "ort-cpu", {})[0] in ("drift", "mismatch")
    assert TINY.open(export, "ort-cpu").expectation == expectations()["float16"]


F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
INT8 = {
    "MatMulNBits with accuracy_level 4": ("genai-int4", "ort-cpu", {}, "int8-activations"),
    "OpenVINO's dynamic quantisation": ("optimum-intel-int8", "openvino", F32, "int8-activations"),
    "that on top of bfloat16": (
        "optimum-intel-int8",
        "openvino",
        BFLOAT16 | {"KV_CACHE_PRECISION": "bf16"},
        "bfloat16+int8-activations",
    ),
    "without it": ("optimum-intel-int8", "openvino", F32 | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}, "float32"),
}


@MODES
@pytest.mark.parametrize("case", INT8)
def test_on_the_weights_of_an_export_what_is_left_is_the_noise_of_what_its_settings_say(case, use_cache):
    export, runtime, options, name = INT8[case]
    assert TINY.open(EXPORTS / export, runtime, options).expectation == expected(name)
    verdict, noise = judged(EXPORTS / export, reference(name, EXPORTS / export), use_cache, runtime, options)
    assert verdict == "equal"
    assert 0.5 < noise.logits < 1.5


def test_groups_of_another_size_are_expected_as_such():
    options = F32 | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "16"}
    found = TINY.open(EXPORTS / "optimum-intel-int8", "openvino", options).expectation
    assert (found.name, found.arithmetic.block) == ("int8-activations by 16", 16)


def test_names_are_joined_to_one_expectation_whose_cache_comes_last():
    found = expected("ov-u8+bfloat16")
    assert found is not None
    assert (found.name, found.arithmetic) == ("bfloat16+ov-u8", ARITHMETICS["bfloat16"])
    assert found == joined(expectations()["bfloat16"], expectations()["ov-u8"])
    assert found.without_cache == expectations()["bfloat16"]
    assert expected("float32") is EXACT
    assert expected("ov-u8").without_cache == EXACT
    assert expected("bfloat16+int8-activations").arithmetic == Arithmetic("", ml_dtypes.bfloat16, 32)
    assert expected("auto") is None


@pytest.mark.parametrize("name", ["bf16", "bfloat16+", "bfloat16+float16", "ov-u8+int8-kv", "bfloat16+bfloat16"])
def test_names_that_are_none_or_exclude_each_other_are_refused(name):
    with pytest.raises(InputError, match=r"^--expect: "):
        expected(name)


def test_what_drifts_in_float32_because_it_is_bfloat16_is_explained_by_its_own_settings():
    cells = TINY.cells(EXPORTS / "optimum-intel", "openvino", options=BFLOAT16)
    assert [(cell.cache, cell.verdict, cell.expect) for cell in cells.values()] == [
        ("off", "drift", "float32"),
        ("on", "drift", "float32"),
    ]
    assert {cell.explained_by for cell in cells.values()} == {"bfloat16"}


def test_a_fault_on_top_of_bfloat16_is_not_explained_by_it(tmp_path):
    path = write_faulty(TINY.checkpoint, tmp_path / "model.onnx", **FAULTS["another rope_theta"])
    cells = TINY.cells(path, "openvino", options=BFLOAT16)
    assert {(cell.verdict, cell.explained_by) for cell in cells.values()} <= {("drift", None), ("mismatch", None)}


def test_what_openvino_does_by_itself_is_equal_when_its_settings_say_what_is_expected(tmp_path):
    """With its defaults, on a processor that has it: bfloat16, and a cache of 8 bits."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"token_ids": {prompt}}}\n' for prompt in PROMPTS))
    cache = ("--provider-option", "KV_CACHE_PRECISION=u8")  # what the plugin does unless the export asks for more
    given = (FIXTURES / "tiny_llama", EXPORTS / "optimum-intel", "--runtime", "openvino", *cache, "--prompts", prompts)
    done = verify("compare", *given, "--max-new-tokens", 8, "--expect", "auto", "--json", "-")
    assert done.code == 0, done.out + done.err
    cells = json.loads(done.out)["cells"]
    narrow = "bfloat16" if cells[0]["settings"]["effective"]["INFERENCE_PRECISION_HINT"] == "bf16" else None
    assert [cell["expect"] for cell in cells] == [narrow or "float32", f"{narrow}+ov-u8" if narrow else "ov-u8"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "float32"),
        ({"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}'}, "bfloat16"),
        ({"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'}, "float32"),
    ],
)
def test_openvinos_provider_computes_as_its_options_say(options, name):
    candidate = TINY.open(EXPORTS / "optimum", "ort-openvino", options)
    assert candidate.expectation.name == name
    assert judged(EXPORTS / "optimum", reference(name), True, "ort-openvino", options)[0] == "equal"
