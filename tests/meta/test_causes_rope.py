"""Mistakes in the rotary embedding and positions: each is reproduced by its own counterfactual, and by no other."""

from dataclasses import replace
from functools import partial

import pytest

from refengine.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.meta.explaining import Subject
from verify.causes.catalogue import CATALOGUE
from verify.causes.rope import rope_scaling, rope_table_short, rope_theta
from verify.export.faults.rope import FAULTS, other_rope
from verify.export.faults.writing import Fault, write_faulty

pytestmark = pytest.mark.slow

BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.mark.parametrize(
    ("name", "cause", "parameter", "value"),
    [
        ("rope theta 12345.6", rope_theta, "rope_theta", 12345.6),
        ("rope scaled linearly by 3", rope_scaling, "factor", 3.0),
        ("rope table of 16 positions", rope_table_short, "length", 16),
    ],
)
def test_a_parameter_is_found_where_the_graph_does_not_tell(subject, name, cause, parameter, value, tmp_path):
    found = subject.explained(BY_NAME[name], tmp_path).without_constants().searched(cause)
    assert found.ratio <= subject.bound
    assert found.mistakes[0].parameters[parameter] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@pytest.mark.parametrize("instead", [{"rope_type": "default"}, {"factor": 2.5}], ids=["dropped", "factor 2.5"])
def test_a_scaling_that_was_dropped_or_misread_is_found_in_the_graph(scaling, instead, tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", rope_scaling=scaling))
    small = Subject(checkpoint, [[3, 17, 5, 60, 22, 41, 8, 9, 33, 2, 54, 11], [7, 20, 4]])
    fault = Fault("", "rope-scaling", None, partial(write_faulty, modules={"rope_table": other_rope(**instead)}))
    explained = small.explained(fault, tmp_path)
    assert explained.before > 3 * small.bound
    first = next(iter(rope_scaling(explained.evidence)))
    assert instead.items() <= first.parameters.items()
    assert explained.screen.ratio([first]) <= small.bound


@pytest.mark.parametrize("name", ["rope theta 12345.6", "rope scaled linearly by 3"])
def test_frequencies_in_the_graph_tell_the_parameter_and_the_layer_first(subject, name, tmp_path):
    fault = BY_NAME[f"{name}, layer 5"]
    explained = subject.explained(fault, tmp_path)
    anywhere = replace(explained.evidence, suspects=(None,))
    first = next(iter(CATALOGUE[fault.cause](anywhere)))
    assert first.layers == {5}
    assert explained.screen.ratio([first]) <= subject.bound
