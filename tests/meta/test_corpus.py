"""A part of the fault corpus; `python -m benchmarks.faults` runs all of it and prints the scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.meta.corpus import corpus_of
from tests.meta.rows import Others, Row
from tests.meta.scores import confusion, faults_of, is_detected, is_layer_right, is_named, scores, tables
from verify.drive import CandidateRun
from verify.export.faults import outside, stacked
from verify.export.faults.frozen import frozen_faults

FIXTURES = Path(__file__).parents[2] / "fixtures"
EXPORTS = FIXTURES / "exports"
CORPUS = corpus_of(FIXTURES / "tiny_llama", EXPORTS, seconds=900)  # enough on the slowest machine
FAULTS = {fault.name: (kind, fault) for kind, fault in CORPUS.faults()}

NAMED = ("genai: eps 1e-6", "dynamo: gate and up exchanged, layer 2")
PAIRED = ("genai: rope-theta and attention-scale",)
NOT_ADDED = (
    "MLP in place of the residual stream, layer 3",
    "attention in place of the residual stream, layer 2",
)
UNEXPLAINED = ("keys rotated twice, layer 4", "logits times 0.9", *NOT_ADDED)
# One of each kind of edit: these are compared, and not diagnosed.
SEEN = sorted({fault.name for fault in (*outside.FAULTS[::6], *stacked.FAULTS[::6], *frozen_faults(EXPORTS)[::9])})


def found(name: str, seconds: float | None = CORPUS.seconds) -> Row:
    return replace(CORPUS, seconds=seconds).row(*FAULTS[name])


@pytest.mark.parametrize("name", NAMED)
def test_a_fault_is_detected_located_and_named(name):
    row = found(name)
    assert list(faults_of(row)) == []
    assert is_detected(row)
    assert is_layer_right(row)
    assert row.node_right
    assert set(row.causes) <= set(row.named)


@pytest.mark.parametrize("name", PAIRED)
def test_two_faults_in_one_export_are_both_named(name):
    row = found(name)
    assert len(row.causes) == 2
    assert list(faults_of(row)) == []


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_a_fault_outside_the_catalogue_is_located_and_not_explained(name):
    row = found(name, seconds=5)  # what is tried in the time; the script tries everything
    assert (row.status, row.named) == ("unexplained", ())
    assert list(faults_of(row)) == []


@pytest.mark.parametrize("name", SEEN)
def test_a_fault_is_far_beyond_the_noise(name):
    row = found(name, seconds=None)
    assert is_detected(row)
    assert row.effect > 3


def test_mistakes_of_the_loop_are_named():
    rows = list(CORPUS.driven())
    assert len(rows) == 4
    assert [each for row in rows for each in faults_of(row)] == []


def test_names_of_faults_are_unique():
    assert len(FAULTS) == len(CORPUS.faults())


def test_there_are_pairs_and_faults_outside_of_the_catalogue():
    kinds = [kind for kind, _ in FAULTS.values()]
    assert kinds.count("stacked") >= 10
    assert kinds.count("outside") >= 10


RIGHT = Row("a", "catalogue", ("norm-eps",), None, "drift", 9.0, "named", ("norm-eps",), layer=0, node_right=True)
AMBIGUOUS = Row("b", "catalogue", ("rope-theta",), (3,), "drift", 9.0, "ambiguous", ("x", "rope-theta"), layer=3)
MISNAMED = Row("c", "catalogue", ("rope-theta",), (3,), "mismatch", 9.0, "named", ("norm-eps",), layer=2)
LEFT = Row("d", "outside", (), (4,), "mismatch", 9.0, "unexplained", layer=4, node_right=False)
CALLED = Row("e", "outside", (), (), "mismatch", 9.0, "named", ("norm-eps",), layer=-1)
MISSED = Row("f", "catalogue", ("norm-eps",), None, "equal", 4.0)
CLEAN = Row("g", "clean", verdict="equal", effect=0.5)
BROKEN = Row("h", "catalogue", ("norm-eps",), error="it raised")
ROWS = (RIGHT, AMBIGUOUS, MISNAMED, LEFT, CALLED, MISSED, CLEAN, BROKEN)


def test_scores_count_what_was_asked_for():
    found = {score.what: (score.right, score.of) for score in scores(ROWS)}
    assert found == {
        "detected": (5, 7),
        "clean exports equal": (1, 1),
        "layer right": (4, 5),
        "node right": (1, 2),
        "named, and nothing else": (2, 3),
        "not misnamed": (3, 5),
        "rightly unexplained": (1, 2),
        "unexplained and rightly located": (2, 2),
    }


def test_equivalent_causes_count_as_named_and_a_wrong_name_does_not():
    assert is_named(AMBIGUOUS)
    assert not is_named(MISNAMED)
    assert confusion(ROWS) == {
        ("norm-eps", "norm-eps"): 1,
        ("rope-theta", "rope-theta"): 1,
        ("rope-theta", "norm-eps"): 1,
        ("(none in the catalogue)", "(unexplained)"): 1,
        ("(none in the catalogue)", "norm-eps"): 1,
    }


def test_what_is_not_right_is_told_row_by_row():
    assert list(faults_of(RIGHT)) == list(faults_of(CLEAN)) == []
    assert all(list(faults_of(row)) for row in (MISNAMED, LEFT, CALLED, MISSED, BROKEN))
    assert "| h | no verdict: it raised |" in list(tables(ROWS))


def test_other_ways_of_comparing_are_as_their_documents_say():
    right = [np.array([[1.0, 1000.0, 1e-7]])]

    def others(*logits: float) -> Others:
        run = CandidateRun([[1]], [np.array([logits], np.float32)], {}, 0.0)
        return Others.of(run, run, right, [[1]])

    # Polygraphy asks that an element exceed both tolerances, `allclose` their sum.
    assert others(1.0, 1000.004, 3e-7) == Others(True, True, True, True)
    assert others(1.0, 1000.0, 3e-5) == Others(True, False, True, True)
    assert others(1.0, 1000.5, 1e-7) == Others(True, False, True, True)
    assert others(1.003, 1000.0, 1e-7) == Others(True, False, False, True)
    assert others(1.0, 1200.0, 1e-7) == Others(True, False, False, False)
