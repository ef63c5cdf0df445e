"""What holds for the counterfactuals of every cause, whatever it is: they are mistakes, in any order of float32."""

import itertools

import numpy as np
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.weights import Weights
from tests.checkpoints import write_checkpoint
from verify.causes import Evidence, attention, norm_mlp, rope
from verify.causes.catalogue import CATALOGUE, name_of
from verify.causes.constants import Constant
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Counterfactual
from verify.truth.noise import EQUIVALENT_ORDERS, rms

pytestmark = pytest.mark.slow

CAUSES = (*rope.CAUSES, *attention.CAUSES, *norm_mlp.CAUSES)
LAYERS = (None, frozenset({1}))  # of two mistakes at once
MOST_PAIRS = 20
PASSES = Passes([[5, 9, 2, 14, 3, 8, 1], [7, 4, 11]], [[6, 2, 9], [3, 12, 5]], [(0, 1)], use_cache=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint"))


def single(cause, checkpoint, layers=None) -> list[Counterfactual]:
    read = {name: (Constant(4, layers),) for name in ("rope_table_length", "window")}
    evidence = Evidence(checkpoint.config, True, True, longest=9, suspects=(layers,), constants=read)
    return [each for each in cause(evidence) if isinstance(each, Counterfactual)]


def logits(weights, mistakes, **ops) -> np.ndarray:
    return np.concatenate(run_as_if(weights, PASSES, mistakes, **ops))


@pytest.mark.parametrize("layers", [None, frozenset({1})], ids=["all layers", "layer 1"])
@pytest.mark.parametrize("cause", CAUSES, ids=name_of)
def test_a_mistake_is_the_same_in_float64_and_in_every_order_of_float32(cause, layers, checkpoint):
    single_precision, double = (Weights.open(checkpoint, dtype) for dtype in (np.float32, np.float64))
    for mistake in single(cause, checkpoint, layers):
        exact = logits(double, [mistake])
        assert exact.dtype == np.float64
        for ops in EQUIVALENT_ORDERS.values():
            rounded = logits(single_precision, [mistake], ops=ops)
            assert rounded.dtype == np.float32
            assert rms(rounded - exact) <= 1e-4 * rms(exact), mistake.parameters


@pytest.mark.parametrize("cause", CAUSES, ids=name_of)
def test_a_mistake_in_one_layer_is_another_than_in_all(cause, checkpoint):
    double = Weights.open(checkpoint, np.float64)
    right = logits(double, [])
    pairs = zip(single(cause, checkpoint), single(cause, checkpoint, frozenset({1})), strict=False)
    shown = [
        (everywhere, alone)
        for everywhere, alone in ((logits(double, [one]), logits(double, [other])) for one, other in pairs)
        if rms(everywhere - right) > 1e-9 * rms(right)
    ]
    assert shown
    assert all(rms(everywhere - alone) > 0 for everywhere, alone in shown)


def test_without_padding_nothing_about_padding_is_tried(checkpoint):
    evidence = Evidence(checkpoint.config, use_cache=True)
    assert not [*rope.positions_ignore_padding(evidence), *attention.padding_unmasked(evidence)]


def test_without_a_cache_nothing_about_later_steps_is_tried(checkpoint):
    evidence = Evidence(checkpoint.config, is_padded=True)
    assert not list(attention.mask_causal_alignment(evidence))
    assert all("new tokens" not in each.parameters.values() for each in rope.position_offset(evidence))


def test_a_table_or_window_longer_than_every_row_is_not_tried(checkpoint):
    evidence = Evidence(checkpoint.config, longest=2)
    assert not [*rope.rope_table_short(evidence), *attention.sliding_window(evidence)]


BESIDE_EACH_OTHER = [
    ("cache-before-rope", "cache-capacity-as-length"),
    ("cache-capacity-as-length", "cache-before-rope"),
    ("cache-truncated", "cache-layer-order"),
    ("cache-before-rope", "rope-missing"),
]


@pytest.mark.parametrize("causes", BESIDE_EACH_OTHER, ids=" and ".join)
def test_two_mistakes_of_the_cache_can_be_there_at_once(causes, checkpoint):
    weights = Weights.open(checkpoint, np.float32)
    either = (single(CATALOGUE[cause], checkpoint, layers) for cause, layers in zip(causes, LAYERS, strict=True))
    pairs = zip(*either, strict=False)
    for pair in itertools.islice(pairs, MOST_PAIRS):
        assert np.isfinite(logits(weights, pair)).all(), [each.parameters for each in pair]
