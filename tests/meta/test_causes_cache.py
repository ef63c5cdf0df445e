"""Mistakes in the cache: each is reproduced by its own counterfactual, and by no other."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.meta.drivers import Driven, NotReset, losing
from tests.meta.explaining import NEW_TOKENS, Explained, Subject, trained
from verify.candidates import Candidate
from verify.causes import Evidence
from verify.causes.cache import (
    CAUSES,
    cache_capacity_as_length,
    cache_layer_order,
    cache_not_reset,
    cache_quantized,
    cache_truncated,
)
from verify.causes.catalogue import CATALOGUE, name_of
from verify.drive import run_candidate
from verify.export import export_decoder
from verify.export.faults.cache import FAULTS
from verify.export.faults.writing import Fault, write_faulty
from verify.locating.free_taps import misplaced
from verify.naming.as_if import Passes, run_as_if
from verify.naming.screen import Screen

pytestmark = pytest.mark.slow

BY_NAME = {fault.name: fault for fault in FAULTS}
# Codes that rounding moves are noise of a quantised cache, which float32's own is no measure of.
EXACT_CAUSES = [cause for cause in CAUSES if cause is not cache_quantized]


def first_of(cause: str) -> Fault:
    return next(fault for fault in FAULTS if fault.cause == cause)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return trained()


@pytest.fixture(scope="module")
def clean(subject, tmp_path_factory) -> Candidate:
    path = tmp_path_factory.mktemp("clean") / "model.onnx"
    export_decoder(subject.compared.checkpoint, path)
    return subject.compared.open(path)


def driven(subject: Subject, candidate: Candidate, *, together: bool = True) -> Explained:
    """A run of a right export in a wrong loop; the prompts together, or one after the other."""
    reference, rows = subject.compared.reference, range(len(subject.passes.prompts))
    batches = [tuple(rows)] if together else [(row,) for row in rows]
    schedule = [batch for batch in batches for _ in range(NEW_TOKENS)]
    prompts = subject.passes.prompts
    run = run_candidate(candidate, prompts, schedule, use_cache=True, forced=reference.tokens)
    passes = Passes(prompts, reference.tokens, batches, use_cache=True)
    evidence = Evidence(
        subject.compared.checkpoint.config,
        use_cache=True,
        is_padded=together,
        longest=max(reference.lengths),
        batches=len(batches),
        constants={"cache_sources": misplaced(run, reference)},
    )
    fault = Fault("", None, None, lambda checkpoint, path: path)
    return Explained(fault, evidence, Screen(subject.weights, passes, run, reference, rows), subject)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_is_reproduced_by_its_cause_alone(subject, name, tmp_path):
    fault = BY_NAME[name]
    explained = subject.explained(fault, tmp_path)
    assert explained.before > 3 * subject.bound
    # Against all of the family once for each cause: the others are the same mistake elsewhere, or a little more of it.
    in_question = EXACT_CAUSES if fault is first_of(fault.cause) else [CATALOGUE[fault.cause]]
    assert [cause for cause in explained.reproduced_by(in_question) if cause != fault.cause] == []
    assert explained.reproduced_by([CATALOGUE[fault.cause]]) == [fault.cause] or "capacity" in name


def test_every_cause_has_a_fault_in_an_export_or_in_a_loop():
    in_loops = {"cache-not-reset", "cache-quantized"}
    assert {fault.cause for fault in FAULTS} | in_loops == {name_of(cause) for cause in CAUSES}


@pytest.mark.parametrize("name", ["capacity of 200 as length", "capacity of 200 as length, layer 5"])
def test_a_capacity_is_found(subject, name, tmp_path):
    found = subject.explained(BY_NAME[name], tmp_path).searched(cache_capacity_as_length)
    assert found.ratio <= subject.bound
    assert found.mistakes[0].parameters == {"capacity": 200}


@pytest.mark.parametrize(
    ("loop", "parameters"),
    [
        (losing(lambda slots: slice(0, slots - 1)), {"lost": "newest", "tokens": 1}),
        (losing(lambda slots: slice(0, slots - 2), once=True), {"lost": "newest of the prompt", "tokens": 2}),
        (losing(lambda slots: slice(2, slots)), {"lost": "oldest", "tokens": 2}),
    ],
)
def test_a_loop_that_loses_tokens_is_reproduced(subject, clean, loop, parameters):
    explained = driven(subject, Driven(clean, loop))
    best = explained.tried(cache_truncated)[0]
    assert explained.before > 3 * subject.bound
    assert (best.mistakes[0].parameters, explained.is_reproduced(best)) == (parameters, True)


def test_the_room_of_a_buffer_that_shifts_is_found(subject, clean):
    explained = driven(subject, Driven(clean, losing(lambda slots: slice(max(0, slots - 17), None))))
    found = explained.searched(cache_truncated)
    assert found.ratio <= subject.bound
    assert found.mistakes[0].parameters == {"lost": "oldest", "capacity": 17}


@pytest.mark.parametrize("go_on", [False, True])
def test_a_cache_that_is_not_reset_is_reproduced(subject, clean, go_on):
    explained = driven(subject, NotReset(clean, go_on=go_on), together=False)
    assert explained.before > 3 * subject.bound
    assert explained.reproduced_by(EXACT_CAUSES) == ["cache-not-reset"]
    best = explained.tried(cache_not_reset)[0]
    assert best.mistakes[0].parameters == {"positions": "go on" if go_on else "begin again"}


def test_a_quantised_cache_is_told_from_all_others(subject):
    """What the engine itself gives in float32 with int8 vectors, held against every scheme in float64."""
    evidence = evidence_with_cache(subject)
    schemes = {each.parameters["scheme"]: each for each in cache_quantized(evidence) if "scheme" in each.parameters}
    given = run_as_if(subject.weights, subject.passes, [schemes["int8"]])

    def left(scheme: str) -> float:
        logits = run_as_if(subject.weights64, subject.passes, [schemes[scheme]])
        # The median, since a code that rounding moves over a step is off in some positions, and no mistake.
        return float(np.median(np.abs(np.concatenate(given) - np.concatenate(logits)).max(axis=-1)))

    nearest = sorted(schemes, key=left)
    assert nearest[0] == "int8"
    assert left("int8") < left(nearest[1]) / 10


def evidence_with_cache(subject: Subject) -> Evidence:
    return Evidence(subject.compared.checkpoint.config, use_cache=True, longest=30)


def test_without_a_cache_nothing_of_it_is_tried(subject):
    evidence = replace(evidence_with_cache(subject), use_cache=False, batches=2)
    assert [each for cause in CAUSES for each in cause(evidence)] == []


def test_a_cache_that_is_handed_on_rightly_is_the_right_one(subject):
    """Whatever a mistake of the cache does besides it, it does the passes of a cache."""
    right = next(iter(cache_truncated(evidence_with_cache(subject))))
    harmless = replace(right, ops=lambda ops: ops, cache=lambda pasts, step: list(pasts))
    handed, plain = (
        np.concatenate(run_as_if(subject.weights64, subject.passes, mistakes)) for mistakes in ([harmless], [])
    )
    np.testing.assert_allclose(handed, plain, rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", ["keys first, read as pairs", "pairs, read as keys first"])
def test_layers_whose_caches_are_not_equally_long_are_not_taken_for_each_other(subject, order):
    """As beside a layer that loses tokens: no candidate could run like that."""
    evidence = Evidence(subject.compared.checkpoint.config, use_cache=True, longest=20, suspects=(frozenset({5}),))
    lost = next(one for one in cache_truncated(evidence) if one.parameters.get("lost") == "newest")
    dealt = next(one for one in CATALOGUE["cache-layer-order"](evidence) if one.parameters.get("order") == order)
    alone, both = (run_as_if(subject.weights, subject.passes, mistakes) for mistakes in ([lost], [lost, dealt]))
    for alone_PV, both_PV in zip(alone, both, strict=True):
        np.testing.assert_array_equal(alone_PV, both_PV)


def give_layer_3_as_4(kinds: Sequence[str], model: onnx.ModelProto) -> None:
    """Layer 4 gives out what layer 3 does, having used its own rightly."""
    for kind in kinds:
        name = f"present.4.{kind}"
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [f"{name}/own" if each == name else each for each in names]
        model.graph.node.append(helper.make_node("Identity", [f"present.3.{kind}"], [name]))


@pytest.mark.parametrize(
    ("kinds", "said"),
    [(["key", "value"], "layer 4 finds what layer 3 left"), (["value"], "layer 4 finds the values of layer 3")],
)
def test_a_layer_that_gives_what_another_one_does_is_told_by_what_it_gives(subject, tmp_path, kinds, said):
    path = tmp_path / "model.onnx"
    write_faulty(subject.compared.checkpoint, path, edit=partial(give_layer_3_as_4, kinds))
    explained = driven(subject, subject.compared.open(path))
    assert explained.before > 3 * subject.bound
    best = explained.tried(cache_layer_order)[0]
    assert (best.mistakes[0].parameters, best.mistakes[0].layers) == ({"order": said}, frozenset({4}))
    assert explained.is_reproduced(best)


def test_a_layer_that_may_find_its_neighbours_cache_is_tried_where_nobody_shows_it(subject):
    evidence = replace(evidence_with_cache(subject), suspects=(frozenset({4}),))
    said = [each.parameters["order"] for each in cache_layer_order(evidence)]
    assert "layer 4 finds what layer 3 left" in said
    assert "layer 4 finds what layer 5 left" in said


def read_past_in_float16(model: onnx.ModelProto) -> None:
    """Whoever reads a past finds it rounded."""
    for value in [value for value in model.graph.input if value.name.startswith("past_key_values")]:
        for node in model.graph.node:
            node.input[:] = [f"{name}/rounded" if name == value.name else name for name in node.input]
        steps = [(value.name, f"{value.name}/half", TensorProto.FLOAT16)]
        steps.append((steps[0][1], f"{value.name}/rounded", TensorProto.FLOAT))
        for given, made, dtype in reversed(steps):
            model.graph.node.insert(0, helper.make_node("Cast", [given], [made], to=dtype))


def test_a_past_that_is_rounded_when_it_is_read_is_found(subject, tmp_path):
    fault = Fault("", "cache-quantized", None, partial(write_faulty, edit=read_past_in_float16), needs=("cache",))
    explained = subject.explained(fault, tmp_path)
    assert explained.before > 3 * subject.bound
    best = explained.tried(cache_quantized)[0]
    assert best.mistakes[0].parameters == {"past": "float16"}
    assert explained.is_reproduced(best)
