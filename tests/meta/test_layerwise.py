"""Each layer that is wrong by itself explained by itself, before the whole model is run."""

import math

import pytest

from tests.meta.explaining import Subject
from tests.verify.comparing import Here
from verify.causes import Evidence
from verify.causes.catalogue import CATALOGUE
from verify.drive import run_candidate
from verify.export.faults import FAULTS
from verify.locate import locate
from verify.naming.counterfactual import Counterfactual
from verify.naming.layer_screen import LayerScreen, is_of_layers
from verify.naming.layerwise import explain_layers

OF_STEPS = (
    "past ignored",
    "newest 2 of the past hidden, layer 5",
    "keys cached before rope, layer 5",
    "keys and values swapped",
    "keys and values swapped, layer 5",
)


def proposed(subject: Subject, name: str, directory) -> list[tuple[Counterfactual, ...]]:
    """What the layers of an export with this fault tell by themselves."""
    fault = next(each for each in FAULTS if each.name == name)
    checkpoint, passes = subject.compared.checkpoint, subject.passes
    reference = subject.compared.reference
    candidate = Here(subject.compared.open(fault.write(checkpoint, directory / "model.onnx")))
    steps = [passes.batches[0]] * len(passes.tokens[0])
    run = run_candidate(candidate, passes.prompts, steps, use_cache=True, forced=reference.tokens)
    located = locate(checkpoint, candidate, run, reference, passes)
    evidence = Evidence(checkpoint.config, use_cache=True, is_padded=True, longest=max(reference.lengths))
    screens = [LayerScreen(subject.weights, each) for each in located.given]
    return list(explain_layers(screens, CATALOGUE, evidence, math.inf).proposed)


@pytest.mark.parametrize("name", OF_STEPS)
def test_a_mistake_in_what_steps_hand_on_is_told_by_the_layers_that_have_it(subject, tmp_path, name):
    fault = next(each for each in FAULTS if each.name == name)
    first, *_ = proposed(subject, name, tmp_path)
    assert [(each.cause, each.layers) for each in first] == [(fault.cause, fault.layers)]


def test_what_one_layer_finds_of_another_is_not_told_by_a_layer(subject):
    evidence = Evidence(subject.compared.checkpoint.config, use_cache=True, longest=24, suspects=(frozenset({4, 7}),))
    orders = [each for each in CATALOGUE["cache-layer-order"](evidence) if isinstance(each, Counterfactual)]
    assert orders
    assert not any(map(is_of_layers, orders))
