"""Coarser arithmetic explains a run that is as noisy as it is; less noise, or more, is something else."""

from dataclasses import replace

import numpy as np
import pytest

from refengine.weights import Weights
from tests.meta.explaining import Subject, trained
from verify.causes import Evidence
from verify.causes.precision import CAUSES, explains
from verify.drive import CandidateRun
from verify.judge import compare_noise
from verify.truth.arithmetic import ARITHMETICS
from verify.truth.reference import Reference, ReferenceRun, one_pass

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subject() -> Subject:
    return trained()


@pytest.fixture(scope="module")
def references(subject) -> dict[str, ReferenceRun]:
    """The reference's run of the same tokens, with the noise of each arithmetic."""
    compared = subject.compared
    return {
        name: Reference(compared.checkpoint, arithmetic=arithmetic).run(
            compared.prompts, compared.max_new_tokens, compared.reference.tokens
        )
        for name, arithmetic in ARITHMETICS.items()
    }


def given(subject: Subject, weights: Weights, ops) -> CandidateRun:
    """What a runtime may give that computes so."""
    reference = subject.compared.reference
    logits_PV, _ = one_pass(weights, reference.prompts, reference.tokens, None, ops)
    rows = np.split(logits_PV, np.cumsum(reference.lengths)[:-1])
    return CandidateRun(reference.tokens, rows, {}, seconds=0.0)


def in_arithmetic(subject: Subject, name: str) -> CandidateRun:
    arithmetic, positions = ARITHMETICS[name], sum(subject.compared.reference.lengths)
    ops = next(iter(arithmetic.orders(positions).values()))
    return given(subject, arithmetic.weights(subject.compared.checkpoint), ops)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_run_in_an_arithmetic_is_explained_by_it_alone(subject, references, name):
    run = in_arithmetic(subject, name)
    assert [other for other in ("float16", "bfloat16") if explains(compare_noise(run, references[other]))] == [name]


def test_int8_activations_are_explained_by_themselves(subject, references):
    run = in_arithmetic(subject, "int8-activations")
    assert explains(compare_noise(run, references["int8-activations"]))
    assert not explains(compare_noise(run, references["float16"]))


def test_a_run_in_float32_is_not_explained_by_arithmetic_that_would_be_coarser(subject, references):
    ops = next(iter(ARITHMETICS["int8-activations"].orders(1).values()))
    run = given(subject, subject.weights, replace(ops, linear=lambda x, proj: x @ proj.weight_OI.T))
    noises = [compare_noise(run, reference) for reference in references.values()]
    assert all(noise.logits <= noise.bound for noise in noises)
    assert not any(map(explains, noises))


def test_every_unit_has_the_arithmetic_that_its_cause_names(subject):
    units = [unit for cause in CAUSES for unit in cause(Evidence(subject.compared.checkpoint.config))]
    assert [unit.arithmetic.name for unit in units[:2]] == ["float16", "bfloat16"]
    assert [unit.arithmetic.block for unit in units[2:]] == [unit.parameters["group"] for unit in units[2:]]


@pytest.mark.parametrize(
    ("is_plain", "narrow", "is_named"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_the_plain_cpu_computes_in_narrow_floats_only_where_the_graph_says_so(subject, is_plain, narrow, is_named):
    constants = {"narrow_floats": (True,)} if narrow else {}
    evidence = Evidence(subject.compared.checkpoint.config, is_plain=is_plain, constants=constants)
    found = {unit.cause for cause in CAUSES for unit in cause(evidence)} - {"activations-quantized"}
    assert found == ({"arithmetic-float16", "arithmetic-bfloat16"} if is_named else set())


def test_where_every_layer_is_right_nothing_is_computed_more_coarsely(subject):
    evidence = Evidence(subject.compared.checkpoint.config, is_outside_layers=True)
    assert [unit for cause in CAUSES for unit in cause(evidence)] == []
