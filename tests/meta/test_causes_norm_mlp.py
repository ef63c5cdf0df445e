"""Mistakes in the norms and in the MLP: each is reproduced by its own counterfactual, and by no other one."""

import math
from dataclasses import replace

import numpy as np
import pytest

from verify.causes.norm_mlp import ACTIVATIONS, norm_eps
from verify.export.faults.norm_mlp import FAULTS

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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gelu_is_exact_in_either_precision(dtype):
    x = np.linspace(-9, 9, 20001).astype(dtype)
    exact = np.array([number * (1 + math.erf(number / math.sqrt(2))) / 2 for number in x.tolist()])
    given = ACTIVATIONS["gelu"](x)
    assert given.dtype == dtype
    assert np.abs(given - exact).max() <= 8 * np.finfo(dtype).eps
