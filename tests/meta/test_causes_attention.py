"""Mistakes in attention: each is reproduced by its own counterfactual, and by no other one."""

from dataclasses import replace

import pytest

from verify.causes.attention import attention_scale, attention_softcap, sliding_window
from verify.causes.catalogue import CATALOGUE
from verify.export.faults.attention import FAULTS

pytestmark = pytest.mark.slow

BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.mark.parametrize(
    ("name", "cause", "parameter", "value"),
    [
        ("scores scaled by 0.9", attention_scale, "scale", 0.225),
        ("soft cap of 5", attention_softcap, "softcap", 5.0),
        ("window of 7", sliding_window, "window", 7),
    ],
)
def test_a_parameter_is_found_where_the_graph_does_not_tell(subject, name, cause, parameter, value, tmp_path):
    found = subject.explained(BY_NAME[name], tmp_path).without_constants().searched(cause)
    assert found.ratio <= subject.bound
    assert found.mistakes[0].parameters[parameter] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("name", ["scores not scaled", "soft cap of 5", "window of 7"])
def test_numbers_in_the_graph_tell_the_parameter_and_the_layer_first(subject, name, tmp_path):
    fault = BY_NAME[f"{name}, layer 6"]
    explained = subject.explained(fault, tmp_path)
    anywhere = replace(explained.evidence, suspects=(None,))
    first = next(iter(CATALOGUE[fault.cause](anywhere)))
    assert first.layers == {6}
    assert explained.screen.ratio([first]) <= subject.bound
