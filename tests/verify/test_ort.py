"""Exports run by ONNX Runtime: what comes out, and what is said about who ran it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.checkpoint import open_checkpoint
from refengine.config import Config
from refengine.model import forward
from refengine.tokens import left_padded
from refengine.weights import Weights
from tests.checkpoints import TINY, write_checkpoint
from tests.verify.handmade import (
    GROUPED_QUERY,
    ONE_LAYER,
    K,
    V,
    grouped_query_decoder,
    last_logits_decoder,
    repeating_decoder,
)
from verify.candidates.ort import OrtCandidate
from verify.candidates.ort_session import openvino_libraries
from verify.errors import NoVerdict
from verify.export import export_decoder

RUNTIMES = ["ort-cpu", "ort-openvino"]
CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"
CONFIG = Config.from_dict(TINY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def weights(checkpoint) -> Weights:
    return Weights.open(open_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def cached(checkpoint) -> Path:
    export_decoder(open_checkpoint(checkpoint), checkpoint / "cached.onnx")
    return checkpoint / "cached.onnx"


@pytest.fixture(scope="module", params=RUNTIMES)
def candidate(request, cached) -> OrtCandidate:
    return OrtCandidate.open(cached, request.param, {}, CONFIG)


def tokens(*rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return left_padded(rows)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """To float32 rounding of sums in another order; the logits here are of size 1."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_logits_are_those_of_the_reference(candidate, weights):
    ids_BT, positions_BT = tokens([3, 1, 4, 1, 5, 9, 2, 6])
    step = candidate.run(ids_BT, positions_BT)
    assert_same(step.logits_BTV, forward(weights, ids_BT, positions_BT))


@settings(max_examples=15)
@given(row=st.lists(st.integers(0, V - 1), min_size=2, max_size=12), data=st.data())
def test_a_prompt_cut_into_cached_steps_gives_the_logits_of_the_whole(candidate, row, data):
    ids_BT, positions_BT = tokens(row)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(row) - 1))))
    past, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, len(row)], strict=True):
        step = candidate.run(ids_BT[:, start:stop], positions_BT[:, start:stop], past)
        past = step.past
        pieces.append(step.logits_BTV)
    assert_same(np.concatenate(pieces, axis=1), candidate.run(ids_BT, positions_BT).logits_BTV)
    np.testing.assert_array_equal(past.positions_BS, positions_BT)


def test_rows_padded_on_the_left_give_the_logits_of_each_alone_and_in_the_next_step_too(candidate):
    rows = [3, 1, 4, 1, 5], [9, 2], [6]
    assert candidate.can_pad_left
    ids_BT, positions_BT = tokens(*rows)
    together = candidate.run(ids_BT, positions_BT)
    next_ids_BT, next_positions_BT = np.array([[7], [8], [9]]), positions_BT[:, -1:] + 1
    later = candidate.run(next_ids_BT, next_positions_BT, together.past)
    for index, row in enumerate(rows):
        one = slice(index, index + 1)
        alone = candidate.run(*tokens(row))
        assert_same(together.logits_BTV[one, -len(row) :], alone.logits_BTV)
        alone_later = candidate.run(next_ids_BT[one], np.array([[len(row)]]), alone.past)
        assert_same(later.logits_BTV[one], alone_later.logits_BTV)


def test_what_a_step_gave_is_its_own_and_does_not_change_with_later_steps(candidate):
    ids_BT, positions_BT = tokens([3, 1, 4])
    step = candidate.run(ids_BT, positions_BT)
    arrays = [step.logits_BTV, *step.past.arrays.values()]
    before = [array.copy() for array in arrays]
    candidate.run(ids_BT[:, ::-1].copy(), positions_BT)
    assert all(array.flags.owndata for array in arrays)
    assert all(np.array_equal(array, was) for array, was in zip(arrays, before, strict=True))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_export_without_a_cache_gives_logits_and_no_past(checkpoint, tmp_path, weights, runtime):
    export_decoder(open_checkpoint(checkpoint), tmp_path / "uncached.onnx", cache=False)
    uncached = OrtCandidate.open(tmp_path / "uncached.onnx", runtime, {}, CONFIG)
    ids_BT, positions_BT = tokens([3, 1, 4, 1, 5], [9, 2])
    step = uncached.run(ids_BT, positions_BT)
    assert step.past is None
    real_BT = positions_BT >= 0
    assert_same(step.logits_BTV[real_BT], forward(weights, ids_BT, positions_BT)[real_BT])


def test_an_export_may_give_the_logits_of_the_last_token_alone(tmp_path):
    whole = OrtCandidate.open(repeating_decoder(tmp_path / "whole.onnx", heads=K), "ort-cpu", {}, ONE_LAYER)
    last = OrtCandidate.open(last_logits_decoder(tmp_path / "last.onnx"), "ort-cpu", {}, ONE_LAYER)
    logits_BTV = whole.run(*tokens([1, 2, 3])).logits_BTV
    assert logits_BTV.shape == (1, 3, V)
    np.testing.assert_array_equal(last.run(*tokens([1, 2, 3])).logits_BTV, logits_BTV[:, -1:])


DEFAULTS = {"device_type": "CPU", "load_config": '{"CPU": {"CPU_RUNTIME_CACHE_CAPACITY": "0"}}'}


def test_the_openvino_provider_takes_our_export_whole_and_says_so(cached):
    told = OrtCandidate.open(cached, "ort-openvino", {}, CONFIG).settings
    providers = told.effective["providers"]
    assert told.requested == DEFAULTS
    assert providers[OPENVINO]["nodes"] == sum(providers[OPENVINO]["operators"].values()) > 100
    assert providers[CPU]["nodes"] == 0


def test_the_cpu_provider_runs_everything_itself(cached):
    told = OrtCandidate.open(cached, "ort-cpu", {}, CONFIG).settings
    assert list(told.effective["providers"]) == [CPU]
    assert told.requested == {}


def test_provider_options_are_passed_on_beside_the_default_device(cached):
    given_options = {"precision": "ACCURACY", "num_of_threads": "1"}
    told = OrtCandidate.open(cached, "ort-openvino", given_options, CONFIG).settings
    assert told.requested == DEFAULTS | given_options


def test_grouped_query_attention_is_never_fed_left_padding(tmp_path):
    grouped = OrtCandidate.open(grouped_query_decoder(tmp_path / "model.onnx"), "ort-cpu", {}, GROUPED_QUERY)
    assert grouped.interface.has_position_ids
    assert grouped.interface.has_attention_mask
    assert not grouped.can_pad_left
    assert grouped.run(*tokens([1, 2, 3])).logits_BTV.shape == (1, 3, V)
    with pytest.raises(NoVerdict, match="cannot be fed left padding; compare one prompt at a time"):
        grouped.run(*tokens([1, 2, 3], [4]))


def test_the_openvino_provider_leaves_grouped_query_attention_to_the_cpu_and_says_so(tmp_path):
    path = grouped_query_decoder(tmp_path / "model.onnx")
    grouped = OrtCandidate.open(path, "ort-openvino", {}, GROUPED_QUERY)
    providers = grouped.settings.effective["providers"]
    assert providers[CPU]["operators"]["GroupQueryAttention"] == 1
    assert "GroupQueryAttention" not in providers[OPENVINO]["operators"]
    on_cpu = OrtCandidate.open(path, "ort-cpu", {}, GROUPED_QUERY)
    expected = on_cpu.run(*tokens([1, 2, 3])).logits_BTV
    np.testing.assert_allclose(grouped.run(*tokens([1, 2, 3])).logits_BTV, expected, rtol=1e-4, atol=1e-4)


def test_an_export_without_positions_is_never_fed_left_padding(tmp_path):
    path = repeating_decoder(tmp_path / "model.onnx", heads=K)
    assert not OrtCandidate.open(path, "ort-cpu", {}, ONE_LAYER).can_pad_left


def test_openvino_libraries_are_directories_of_the_package_or_of_its_installer(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENVINO_LIB_PATHS", str(tmp_path))
    found = openvino_libraries()
    in_package = [place for place in found if place.is_dir() and place.parts[-2:] == ("openvino", "libs")]
    assert found in ([tmp_path], in_package)
