"""The engine's operators against ONNX's own backend node suite: every case that a decoder can express."""

import warnings

import numpy as np
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase as Case  # pytest would collect a class named Test...

from tests.refengine.onnx_adapters import ADAPTERS, run_node

LEFT_OUT = {
    "test_attention_bidirectional_window": "its queries see two keys after their own; a decoder's never do",
}

# Expected values were computed in the inputs' own dtype, by another order of sums. For float32 the suite's
# own tolerance (1e-3) would pass mistakes; for the others these are two units in the last place, as in its
# runner.
RELATIVE = {"float32": 1e-5, "float16": 2**-9, "bfloat16": 2**-6}
ABSOLUTE = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}


def cases_of_the_operators() -> dict[str, Case]:
    """By name, every collected case whose model has a node of one of the operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose while they are made
        collected = collect_testcases(None)
    return {case.name: case for case in collected if any(node.op_type in ADAPTERS for node in case.model.graph.node)}


CASES = cases_of_the_operators()


@pytest.mark.parametrize("name", sorted(CASES.keys() - LEFT_OUT.keys()))
def test_the_operators_compute_what_the_onnx_case_expects(name: str) -> None:
    case = CASES[name]
    (node,) = case.model.graph.node
    assert case.data_sets
    for inputs, expected in case.data_sets:
        found = run_node(node, list(inputs))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            kind = one.dtype.name
            np.testing.assert_allclose(
                one.astype(np.float32), other.astype(np.float32), rtol=RELATIVE[kind], atol=ABSOLUTE[kind]
            )


def test_every_case_left_out_is_one_of_the_suite() -> None:
    assert LEFT_OUT.keys() <= CASES.keys()


def test_the_suite_has_cases_of_every_operator_and_every_feature_of_a_decoder() -> None:
    nodes = [case.model.graph.node[0] for case in CASES.values()]
    assert {node.op_type for node in nodes} == ADAPTERS.keys()
    attributes = {attribute.name for node in nodes for attribute in node.attribute}
    assert attributes >= {
        "epsilon",
        "interleaved",
        "is_causal",
        "kv_num_heads",
        "left_window_size",
        "scale",
        "softcap",
    }
    inputs = {name for node in nodes for name in node.input}
    assert inputs >= {"position_ids", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"}
