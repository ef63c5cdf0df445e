"""Mistakes in the norms and in the MLP: each is reproduced by its own counterfactual, and by no other one."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from verify.causes.norm_mlp import ACTIVATIONS, NORMS, norm_eps, norm_weight_offset
from verify.export.faults.norm_mlp import FAULTS
from verify.export.faults.writing import Fault, changed_weight, write_faulty

pytestmark = pytest.mark.slow

BY_NAME = {fault.name: fault for fault in FAULTS}


def test_an_epsilon_is_found_where_the_graph_does_not_tell(subject, tmp_path):
    found = subject.explained(BY_NAME["eps 3.3e-5"], tmp_path).without_constants().searched(norm_eps)
    assert found.ratio <= subject.bound
    assert found.mistakes[0].parameters["rms_norm_eps"] == pytest.approx(3.3e-5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        ("eps 1e-6", None, {"rms_norm_eps": 1e-6}),
        ("eps 3.3e-5, layer 4", {4}, {"rms_norm_eps": 3.3e-5}),
        ("eps 1e-3 after attention, layer 4", {4}, {"rms_norm_eps": 1e-3, "norm": "post_attention_layernorm"}),
        ("eps 1e-2 in the last norm", {12}, {"rms_norm_eps": 1e-2}),
    ],
)
def test_an_epsilon_in_the_graph_comes_with_its_place(subject, name, layers, parameters, tmp_path):
    explained = subject.explained(BY_NAME[name], tmp_path)
    anywhere = replace(explained.evidence, suspects=(None,))
    first = next(each for each in norm_eps(anywhere) if explained.screen.ratio([each]) <= subject.bound)
    assert (first.layers, first.parameters) == (layers, parameters)


@pytest.mark.parametrize("norm", NORMS)
def test_one_more_in_a_single_norm_is_found_there(subject, norm, tmp_path):
    read = changed_weight(f"model.layers.4.{norm}.weight", lambda weight: weight + 1)
    fault = Fault("one more", "norm-weight-offset", frozenset({4}), partial(write_faulty, read=read))
    explained = subject.explained(fault, tmp_path)
    there = replace(explained.evidence, suspects=(frozenset({4}),))
    found = [each for each in norm_weight_offset(there) if explained.screen.ratio([each]) <= subject.bound]
    assert [each.parameters for each in found] == [{"offset": 1, "norm": norm}]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gelu_is_exact_in_either_precision(dtype):
    x = np.linspace(-9, 9, 20001).astype(dtype)
    exact = np.array([number * (1 + math.erf(number / math.sqrt(2))) / 2 for number in x.tolist()])
    given = ACTIVATIONS["gelu"](x)
    assert given.dtype == dtype
    assert np.abs(given - exact).max() <= 8 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "x", "y"),
    [("relu2", 3.0, 9.0), ("mish", 1.0, 0.86509839), ("hard_swish", 1.0, 2 / 3), ("hard_swish", -4.0, 0.0)],
)
def test_an_activation_of_another_family_is_what_its_paper_says(name, x, y, dtype):
    given = ACTIVATIONS[name](np.array([x], dtype))
    assert given.dtype == dtype
    assert given[0] == pytest.approx(y, rel=1e-6)
