"""Mistakes in the weights: read from the export, or guessed where it cannot be read; no other one of them fits."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.weights import HEAD, Weights
from tests.checkpoints import write_checkpoint
from tests.meta.explaining import Explained, Subject, trained
from verify.candidates.files import describe_candidate
from verify.causes import Evidence
from verify.causes.catalogue import CATALOGUE
from verify.causes.rope import rope_interleaved
from verify.causes.weights import CAUSES, bias_dropped, lm_head_wrong, qk_permuted, weights_rounded
from verify.export.faults.weights import FAULTS, changed_weight, without_biases
from verify.export.faults.writing import Fault, write_faulty
from verify.inspection import exported_checkpoint
from verify.naming.as_if import Passes, run_as_if
from verify.runtimes import RUNTIMES

pytestmark = pytest.mark.slow

INT4_SCALES = "model.layers.5.attn.qkv_proj.MatMul.weight_scales"
# Rounding the tiny model's bfloat16 to float16 changes almost nothing of it.
BY_NAME = {fault.name: fault for fault in FAULTS if fault.cause != "weights-rounded"}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return trained()


def explained(subject: Subject, fault: Fault, directory) -> Explained:
    """With the weights that the export holds."""
    made = subject.explained(fault, directory)
    own = exported_checkpoint(subject.compared.checkpoint, describe_candidate(directory / "model.onnx"))
    return replace(made, evidence=replace(made.evidence, own=own))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_is_reproduced_by_its_cause_alone(subject, name, tmp_path):
    fault = BY_NAME[name]
    made = explained(subject, fault, tmp_path)
    assert made.before > 3 * subject.bound
    assert made.reproduced_by(CAUSES) == [fault.cause]
    assert made.tried(CATALOGUE[fault.cause])[0].mistakes[0].layers == fault.layers or "layers as text" in name


@pytest.mark.parametrize("name", [name for name in BY_NAME if "permuted" in name or "exchanged" in name])
def test_rows_and_layers_are_found_where_the_weights_cannot_be_read(subject, name, tmp_path):
    made = subject.explained(BY_NAME[name], tmp_path)
    assert made.reproduced_by([cause for cause in CAUSES if cause is not weights_rounded]) == [BY_NAME[name].cause]


def test_right_weights_suggest_no_mistake_but_in_how_they_are_read(subject, tmp_path):
    made = explained(subject, replace(FAULTS[0], write=write_faulty), tmp_path)
    suggested = [tuple(each.parameters) for cause in CAUSES for each in cause(made.evidence)]
    assert set(suggested) == {("read as q, k, v",)}


def test_permuted_rows_are_not_taken_for_the_other_rotation_which_gives_the_same(subject, tmp_path):
    fault = BY_NAME["rows of q and k permuted back"]
    unread = subject.explained(fault, tmp_path)
    assert unread.reproduced_by([qk_permuted, rope_interleaved]) == ["qk-permuted", "rope-interleaved"]
    assert explained(subject, fault, tmp_path).reproduced_by([qk_permuted, rope_interleaved]) == ["qk-permuted"]


def test_which_rows_are_permuted_is_read_from_the_export(subject, tmp_path):
    made = explained(subject, BY_NAME["rows of q permuted"], tmp_path)
    assert {each.parameters["rows"] for each in qk_permuted(made.evidence)} == {"q"}


def test_a_head_of_other_numbers_is_not_called_the_embedding(subject, tmp_path):
    rolled = changed_weight(f"{HEAD}.T", lambda weight_IO: np.roll(weight_IO, 1, axis=1))
    fault = Fault("", "lm-head-wrong", None, lambda checkpoint, path: write_faulty(checkpoint, path, read=rolled))
    made = explained(subject, fault, tmp_path)
    assert made.reproduced_by(CAUSES) == ["lm-head-wrong"]
    assert [each.parameters["head"] for each in lm_head_wrong(made.evidence)] == ["another matrix"]


def test_dropped_biases_are_told_apart(tmp_path):
    """Of a random model with biases: each module's alone, by the weights or without them."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", attention_bias=True, mlp_bias=True))
    path = write_faulty(checkpoint, tmp_path / "model.onnx", read=without_biases("v_proj"))
    candidate = RUNTIMES["ort-cpu"](path, "ort-cpu", {}, checkpoint.config)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    given = candidate.run(np.array([prompt]), np.arange(len(prompt))[None]).logits_BTV[0]
    weights, passes = Weights.open(checkpoint, np.float64), Passes([prompt], [[0]], [(0,)], use_cache=True)

    def left(mistake) -> float:
        return float(np.abs(run_as_if(weights, passes, [mistake])[0] - given).max())

    own = exported_checkpoint(checkpoint, describe_candidate(path))
    for evidence in (Evidence(checkpoint.config), Evidence(checkpoint.config, own=own)):
        tried = sorted(bias_dropped(evidence), key=left)
        assert tried[0].parameters == {"of": "v_proj"}
        assert left(tried[0]) < 1e-5
        assert all(left(other) > 1e-3 for other in tried[1:])


def test_a_norm_that_no_layer_has_is_changed_and_no_matter_of_order(subject, tmp_path):
    norm = "model.layers.6.input_layernorm.weight"
    more = partial(write_faulty, read=changed_weight(norm, lambda weight: weight + 1))
    made = explained(subject, Fault("one more", "weights-changed", frozenset({6}), more), tmp_path)
    assert made.reproduced_by(CAUSES) == ["weights-changed"]


def test_a_damaged_scale_is_not_excused_by_the_rounding_around_it(subject, tmp_path):
    model = onnx.load(Path(__file__).parents[2] / "fixtures" / "exports" / "genai-int4" / "model.onnx")
    scales = next(each for each in model.graph.initializer if each.name == INT4_SCALES)
    damaged = onnx.numpy_helper.to_array(scales).copy()
    damaged.flat[3] += damaged.flat[3]
    scales.CopyFrom(onnx.numpy_helper.from_array(damaged, scales.name))
    onnx.save(model, tmp_path / "model.onnx")
    own = exported_checkpoint(subject.compared.checkpoint, describe_candidate(tmp_path / "model.onnx"))
    evidence = Evidence(own.config, own=own)
    (both,) = (each for each in CATALOGUE["weights-changed"](evidence) if "beside" in each.parameters)
    assert (both.layers, both.parameters["beside"]) == ({5}, "weights in int4")
    exact = run_as_if(Weights.open(own, np.float64), subject.passes, ())
    for given_PV, own_PV in zip(run_as_if(subject.weights64, subject.passes, [both]), exact, strict=True):
        np.testing.assert_allclose(given_PV, own_PV, rtol=1e-9)
