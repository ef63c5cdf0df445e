"""Exports run by ONNX Runtime: what comes out, what is said about it, and how failures are told."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from refengine.config import Config
from refengine.errors import InputError
from refengine.generate import left_padded
from refengine.model import forward
from refengine.weights import Weights
from tests.checkpoints import TINY, write_checkpoint
from verify.candidates import Past
from verify.candidates.ort import OrtCandidate, explain_failure, openvino_libraries
from verify.errors import NoVerdict, RuntimeMissing
from verify.export import export_decoder

RUNTIMES = ["ort-cpu", "ort-openvino"]
CONFIG = Config.from_dict(TINY)
N, K, H, V = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim, CONFIG.vocab_size
ONE_LAYER = Config.from_dict(TINY | {"num_hidden_layers": 1})
GROUPED_QUERY = Config.from_dict(
    TINY | {"num_hidden_layers": 1, "head_dim": 8}
)  # ONNX Runtime's operator wants a multiple of 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def weights(checkpoint) -> Weights:
    return Weights.open(open_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def exports(checkpoint) -> dict[str, Path]:
    for name, cache in (("cached", True), ("uncached", False)):
        export_decoder(open_checkpoint(checkpoint), checkpoint / f"{name}.onnx", cache=cache)
    return {name: checkpoint / f"{name}.onnx" for name in ("cached", "uncached")}


@pytest.fixture(scope="module", params=RUNTIMES)
def candidate(request, exports) -> OrtCandidate:
    return OrtCandidate.open(exports["cached"], request.param, {}, CONFIG)


def tokens(*rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return left_padded(rows)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """To float32 rounding of sums in another order; the logits here are of size 1."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def decoder(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    *,
    kv_heads: int | str = K,
    constants: dict[str, np.ndarray] | None = None,
    logits: Sequence[int | str] = ("b", "t", V),
    dtype: int = TensorProto.FLOAT,
    head_dim: int = H,
) -> Path:
    """A one-layer decoder made by hand around `nodes`; `table` holds random logits for each token."""
    table = np.random.default_rng(0).standard_normal((V, V)).astype(np.float32)
    initializers = [
        numpy_helper.from_array(array, name) for name, array in ({"table": table} | (constants or {})).items()
    ]
    value = helper.make_tensor_value_info
    sides = [
        ("key", "past_key_values.0.key", "present.0.key"),
        ("value", "past_key_values.0.value", "present.0.value"),
    ]
    inputs = [
        value("input_ids", TensorProto.INT64, ["b", "t"]),
        value("attention_mask", TensorProto.INT64, ["b", "s"]),
    ]
    inputs += [value(past, dtype, ["b", kv_heads, "p", head_dim]) for _, past, _ in sides]
    outputs = [value("logits", TensorProto.FLOAT, logits)] + [
        value(present, dtype, ["b", kv_heads, "s", head_dim]) for _, _, present in sides
    ]
    graph = helper.make_graph(list(nodes), "decoder", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def cached_by_hand(path: Path, heads: int, **sizes: int | str | Sequence[int | str]) -> Path:
    """Its cache has keys and values of `heads` heads joined to the past, all zero; logits follow from the token alone."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["logits_of_tokens"]),
        # Of no effect, but an input that no node uses confuses the OpenVINO provider about the order of the others.
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["mask"], ["any"], keepdims=0),
        helper.make_node("Mul", ["logits_of_tokens", "any"], ["logits"]),
        helper.make_node("Shape", ["input_ids"], ["b_t"]),
        helper.make_node("Slice", ["b_t", "zero", "one"], ["b"]),
        helper.make_node("Slice", ["b_t", "one", "two"], ["t"]),
        helper.make_node("Concat", ["b", "heads", "t", "size"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["new"]),
        helper.make_node(
            "Concat", ["past_key_values.0.key", "new"], ["present.0.key"], name="/join_keys", axis=2
        ),
        helper.make_node(
            "Concat", ["past_key_values.0.value", "new"], ["present.0.value"], name="/join_values", axis=2
        ),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "heads": heads, "size": H}
    return decoder(
        path,
        nodes,
        constants={name: np.array([number], np.int64) for name, number in numbers.items()},
        **sizes,
    )


def grouped_query_by_hand(path: Path) -> Path:
    """Grouped-query attention as the model builder writes it: without rotation, on vectors looked up by token."""
    rng, H = np.random.default_rng(1), GROUPED_QUERY.head_dim
    constants = {
        f"{kind}_table": rng.standard_normal((V, heads * H)).astype(np.float32)
        for kind, heads in (("q", N), ("k", K), ("v", K))
    }
    constants |= {
        "head": rng.standard_normal((N * H, V)).astype(np.float32),
        "last_axis": np.array([1], np.int64),
        "one": np.array(1, np.int64),
    }
    nodes = [helper.make_node("Gather", [f"{kind}_table", "input_ids"], [kind]) for kind in "qkv"]
    nodes += [
        helper.make_node("ReduceSum", ["attention_mask", "last_axis"], ["counts"], keepdims=0),
        helper.make_node("Sub", ["counts", "one"], ["lengths"]),
        helper.make_node("Cast", ["lengths"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "one"], ["total"]),
        helper.make_node("Cast", ["total"], ["total_sequence_length"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            [
                "q",
                "k",
                "v",
                "past_key_values.0.key",
                "past_key_values.0.value",
                "seqlens_k",
                "total_sequence_length",
            ],
            ["y", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=N,
            kv_num_heads=K,
        ),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    return decoder(path, nodes, constants=constants, head_dim=H)


def test_logits_are_those_of_the_reference(candidate, weights):
    ids_BT, positions_BT = tokens([3, 1, 4, 1, 5, 9, 2, 6])
    step = candidate.run(ids_BT, positions_BT)
    assert_same(step.logits_BTV, forward(weights, ids_BT, positions_BT))


@settings(max_examples=15)
@given(row=st.lists(st.integers(0, V - 1), min_size=2, max_size=12), data=st.data())
def test_a_prompt_cut_into_cached_steps_gives_the_logits_of_the_whole(candidate, row, data):
    ids_BT, positions_BT = tokens(row)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(row) - 1))))
    past, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, len(row)], strict=True):
        step = candidate.run(ids_BT[:, start:stop], positions_BT[:, start:stop], past)
        past = step.past
        pieces.append(step.logits_BTV)
    assert_same(np.concatenate(pieces, axis=1), candidate.run(ids_BT, positions_BT).logits_BTV)
    np.testing.assert_array_equal(past.positions_BS, positions_BT)


def test_rows_padded_on_the_left_give_the_logits_of_each_row_alone_in_the_next_step_too(candidate):
    rows = [3, 1, 4, 1, 5], [9, 2], [6]
    assert candidate.can_pad_left
    ids_BT, positions_BT = tokens(*rows)
    together = candidate.run(ids_BT, positions_BT)
    next_ids_BT, next_positions_BT = np.array([[7], [8], [9]]), positions_BT[:, -1:] + 1
    later = candidate.run(next_ids_BT, next_positions_BT, together.past)
    for index, row in enumerate(rows):
        alone = candidate.run(*tokens(row))
        assert_same(together.logits_BTV[index, -len(row) :], alone.logits_BTV[0])
        assert_same(
            later.logits_BTV[index],
            candidate.run(next_ids_BT[index : index + 1], np.array([[len(row)]]), alone.past).logits_BTV[0],
        )


def test_what_a_step_gave_is_its_own_and_does_not_change_with_later_steps(candidate):
    ids_BT, positions_BT = tokens([3, 1, 4])
    step = candidate.run(ids_BT, positions_BT)
    arrays = [step.logits_BTV, *step.past.arrays.values()]
    before = [array.copy() for array in arrays]
    candidate.run(ids_BT[:, ::-1].copy(), positions_BT)
    assert all(array.flags.owndata for array in arrays)
    assert all(np.array_equal(array, was) for array, was in zip(arrays, before, strict=True))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_export_without_a_cache_gives_logits_and_no_past(exports, weights, runtime):
    uncached = OrtCandidate.open(exports["uncached"], runtime, {}, CONFIG)
    ids_BT, positions_BT = tokens([3, 1, 4, 1, 5], [9, 2])
    step = uncached.run(ids_BT, positions_BT)
    assert step.past is None
    assert_same(step.logits_BTV[0], forward(weights, ids_BT, positions_BT)[0])


def test_the_openvino_provider_takes_our_export_whole_and_says_so(exports):
    settings_of = OrtCandidate.open(exports["cached"], "ort-openvino", {}, CONFIG).settings
    providers = settings_of.effective["providers"]
    assert settings_of.requested == {"device_type": "CPU"}
    assert (
        providers["OpenVINOExecutionProvider"]["nodes"]
        == sum(providers["OpenVINOExecutionProvider"]["operators"].values())
        > 100
    )
    assert providers["CPUExecutionProvider"]["nodes"] == 0


def test_the_cpu_provider_runs_everything_itself(exports):
    settings_of = OrtCandidate.open(exports["cached"], "ort-cpu", {}, CONFIG).settings
    assert list(settings_of.effective["providers"]) == ["CPUExecutionProvider"]
    assert settings_of.requested == {}


def test_provider_options_are_passed_on(exports):
    settings_of = OrtCandidate.open(
        exports["cached"], "ort-openvino", {"precision": "ACCURACY", "num_of_threads": "1"}, CONFIG
    ).settings
    assert settings_of.requested == {"device_type": "CPU", "precision": "ACCURACY", "num_of_threads": "1"}


def test_a_provider_that_takes_no_node_gives_no_verdict(exports):
    with pytest.raises(
        NoVerdict, match="OpenVINOExecutionProvider runs none of the [0-9]+ nodes with device_type=ABACUS"
    ):
        OrtCandidate.open(exports["cached"], "ort-openvino", {"device_type": "ABACUS"}, CONFIG)


@pytest.mark.parametrize("options", [{"device_type": "GPU.77"}, {"precision": "FP33"}])
def test_a_provider_that_rejects_its_options_is_not_replaced_by_the_cpu(exports, options):
    said = ".*".join(f"{key}={value}" for key, value in options.items())
    with pytest.raises(
        NoVerdict,
        match=f"^ort-openvino: OpenVINOExecutionProvider does not accept .*{said}.* --provider-option",
    ):
        OrtCandidate.open(exports["cached"], "ort-openvino", options, CONFIG)


def test_an_option_that_the_provider_does_not_have_is_named(exports):
    with pytest.raises(NoVerdict, match="ort-openvino cannot open it: .*nonsense") as caught:
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
    with pytest.raises(
        InputError, match="candidate has 6 query heads, checkpoint 8: the export is of another model"
    ):
        OrtCandidate.open(exports["uncached"], "ort-cpu", {}, other)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_keys_repeated_to_query_heads_before_the_cache_are_explained_where_the_runtime_fails(
    tmp_path, runtime
):
    path = cached_by_hand(tmp_path / "model.onnx", heads=N, kv_heads="kv_heads")
    candidate = OrtCandidate.open(path, runtime, {}, ONE_LAYER)
    wrong_past = Past(
        {f"past_key_values.0.{kind}": np.zeros((1, K, 2, H), np.float32) for kind in ("key", "value")},
        np.array([[0, 1]]),
    )
    with pytest.raises(
        NoVerdict, match=f"{runtime} failed: .*{N} is num_attention_heads and {K} num_key_value_heads"
    ) as caught:
        candidate.run(np.array([[3]]), np.array([[2]]), wrong_past)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_keys_repeated_to_query_heads_are_explained_where_the_runtime_lets_them_pass_by_an_empty_past(
    tmp_path, runtime
):
    candidate = OrtCandidate.open(
        cached_by_hand(tmp_path / "model.onnx", heads=N, kv_heads="kv_heads"), runtime, {}, ONE_LAYER
    )
    with pytest.raises(NoVerdict, match=f"{N} is num_attention_heads and {K} num_key_value_heads"):
        candidate.run(*tokens([1, 2, 3]))


def test_a_failing_run_is_told_once_and_not_on_the_error_stream(tmp_path, capfd):
    candidate = OrtCandidate.open(cached_by_hand(tmp_path / "model.onnx", heads=K), "ort-cpu", {}, ONE_LAYER)
    with pytest.raises(NoVerdict):
        candidate.run(*tokens([V]))
    assert capfd.readouterr() == ("", "")


def test_an_id_outside_the_table_gives_no_verdict(tmp_path):
    candidate = OrtCandidate.open(cached_by_hand(tmp_path / "model.onnx", heads=K), "ort-cpu", {}, ONE_LAYER)
    with pytest.raises(NoVerdict, match="ort-cpu failed: .*indices element out of data bounds"):
        candidate.run(*tokens([V]))


def test_logits_of_the_last_token_alone_give_no_verdict(tmp_path):
    path = cached_by_hand(tmp_path / "model.onnx", heads=K, logits=("b", "kept", V))
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Mul").output[0] = "all_logits"
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array([n], np.int64), name)
        for name, n in (("minus_one", -1), ("far", 9999))
    )
    model.graph.node.append(helper.make_node("Slice", ["all_logits", "minus_one", "far", "one"], ["logits"]))
    onnx.save(model, path)
    candidate = OrtCandidate.open(path, "ort-cpu", {}, ONE_LAYER)
    with pytest.raises(NoVerdict, match=r"logits: expected shape \(1, 3, 67\) .*, found \(1, 1, 67\)"):
        candidate.run(*tokens([1, 2, 3]))


def test_grouped_query_attention_is_never_fed_left_padding(tmp_path):
    candidate = OrtCandidate.open(
        grouped_query_by_hand(tmp_path / "model.onnx"), "ort-cpu", {}, GROUPED_QUERY
    )
    assert not candidate.can_pad_left
    assert candidate.run(*tokens([1, 2, 3])).logits_BTV.shape == (1, 3, V)
    with pytest.raises(NoVerdict, match="one prompt at a time"):
        candidate.run(*tokens([1, 2, 3], [4]))


def test_the_openvino_provider_leaves_grouped_query_attention_to_the_cpu_and_says_so(tmp_path):
    candidate = OrtCandidate.open(
        grouped_query_by_hand(tmp_path / "model.onnx"), "ort-openvino", {}, GROUPED_QUERY
    )
    providers = candidate.settings.effective["providers"]
    assert providers["CPUExecutionProvider"]["operators"]["GroupQueryAttention"] == 1
    assert "GroupQueryAttention" not in providers["OpenVINOExecutionProvider"]["operators"]
    assert candidate.run(*tokens([1, 2, 3])).logits_BTV.shape == (1, 3, V)


def test_an_export_without_positions_is_never_fed_left_padding(tmp_path):
    assert not OrtCandidate.open(
        cached_by_hand(tmp_path / "model.onnx", heads=K), "ort-cpu", {}, ONE_LAYER
    ).can_pad_left


def test_a_bfloat16_cache_gives_no_verdict(tmp_path):
    path = cached_by_hand(tmp_path / "model.onnx", heads=K, dtype=TensorProto.BFLOAT16)
    with pytest.raises(NoVerdict, match=r"past_key_values.0.key is bfloat16.*float32"):
        OrtCandidate.open(path, "ort-cpu", {}, ONE_LAYER)


def broken(path: Path, how: str) -> Path:
    model = onnx.load(cached_by_hand(path, heads=K))
    if how == "an input from nowhere":
        model.graph.node[0].input[0] = "nowhere"
    elif how == "no such operator":
        model.graph.node[0].op_type = "Gatherer"
    else:
        model.opset_import[0].version = 999
    onnx.save(model, path)
    return path


def test_a_graph_that_does_not_hang_together_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="ort-cpu cannot open it: .*nowhere"):
        OrtCandidate.open(broken(tmp_path / "model.onnx", "an input from nowhere"), "ort-cpu", {}, ONE_LAYER)


@pytest.mark.parametrize(
    ("how", "message"),
    [("no such operator", "No Op registered for Gatherer"), ("an opset to come", "[Oo]pset 999")],
)
def test_what_this_version_of_the_runtime_does_not_know_gives_no_verdict(tmp_path, how, message):
    with pytest.raises(NoVerdict, match=f"ort-cpu cannot open it: .*{message}"):
        OrtCandidate.open(broken(tmp_path / "model.onnx", how), "ort-cpu", {}, ONE_LAYER)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_is_not_installed_is_named_with_the_extra_to_install(exports, monkeypatch, runtime):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not there
    with pytest.raises(
        RuntimeMissing,
        match=rf'^{runtime}: onnxruntime cannot be imported.*pip install "tokenproof\[onnxruntime\]"$',
    ):
        OrtCandidate.open(exports["cached"], runtime, {}, CONFIG)


MISFITS = [  # as ONNX Runtime, its OpenVINO provider and torch word them
    "Non concat axis dimensions must match: Axis 1 has mismatched dimensions of 2 and 6",
    "While validating node 'opset1::Concat': Shape inference input shapes {{1,6,4,10},{1,2,1,10}} Argument shapes are inconsistent",
    "Got invalid dimensions for input: past_key_values.9.value for the following indices index: 1 Got: 6 Expected: 2",
    "Attempting to broadcast an axis by a dimension other than 1. 6 by 2",
    "Sizes of tensors must match except in dimension 2. Expected size 6 but got size 2 for tensor number 1 in the list.",
    "All inputs to Concat must have same shape. Input 1 dim 1 has shape mismatch: 6 vs 2",
]


@pytest.mark.parametrize("message", MISFITS)
def test_query_heads_met_by_key_value_heads_are_recognised_in_every_wording(message):
    assert "num_key_value_heads are wanted" in explain_failure(message, CONFIG)


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


def test_a_head_size_worked_out_from_the_hidden_size_is_recognised():
    assert "6 is hidden_size / num_attention_heads and 10 the checkpoint's head_dim" in explain_failure(
        "Got: 6 Expected: 10", CONFIG
    )


def test_openvino_libraries_are_directories_of_the_package_or_of_its_installer(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENVINO_LIB_PATHS", str(tmp_path))
    found = openvino_libraries()
    assert found == [tmp_path] or all(
        place.is_dir() and place.parts[-2:] == ("openvino", "libs") for place in found
    )
