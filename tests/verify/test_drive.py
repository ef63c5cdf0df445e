"""However a candidate is driven (cache, batches, exports that give less), it is asked for the same tokens."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.generate import generate
from refengine.weights import Weights
from tests.verify.faulty import keep_last_logits, take_two_rows, write_faulty
from tests.verify.handmade import ONE_LAYER, K, N, repeating_decoder
from verify.candidates.ort import OrtCandidate
from verify.drive import CandidateRun, run_candidate
from verify.errors import NoVerdict
from verify.judge import judge
from verify.request import Request
from verify.schedule import SCHEDULES


def drive(compared, path, use_cache: bool = True, forced=None, on_step=lambda tokens: None, **batches) -> CandidateRun:
    request = Request(compared.prompts, compared.max_new_tokens, **batches)
    how = {"use_cache": use_cache, "forced": forced, "on_step": on_step}
    return run_candidate(compared.open(path), compared.prompts, request.schedule, **how)


@pytest.fixture(scope="module")
def run(compared, clean) -> CandidateRun:
    return drive(compared, clean)


@pytest.fixture(scope="module")
def last_logits(compared, tmp_path_factory):
    """An export that gives the logits of the last token alone."""
    path = tmp_path_factory.mktemp("last") / "model.onnx"
    return write_faulty(compared.checkpoint, path, edit=keep_last_logits)


@pytest.mark.parametrize(
    ("use_cache", "batching", "batch_size"),
    [
        *product((True, False), ("static",), (1, 2, 3, 7)),
        *product((True, False), ("dynamic", "continuous"), (2, 3)),
    ],
)
def test_cache_and_batches_change_neither_tokens_nor_logits(compared, clean, run, use_cache, batching, batch_size):
    other = drive(compared, clean, use_cache=use_cache, batching=batching, batch_size=batch_size)
    assert other.tokens == run.tokens
    assert other.caches.keys() == run.caches.keys()
    assert [len(logits) for logits in other.logits] == compared.reference.lengths
    verdict, _, noise = judge(other, compared.reference)
    assert verdict == "equal"
    assert max(noise.cache.values()) < 4


def test_tokens_are_those_that_the_float32_reference_generates(compared, run):
    weights = Weights.open(compared.checkpoint, np.float32)
    endless = replace(weights, config=replace(weights.config, eos_token_id=()))
    assert run.tokens == generate(endless, compared.prompts, compared.max_new_tokens)


def test_an_end_token_does_not_end_a_row(compared, clean):
    """The model's end token follows the text that its training joined with one."""
    end = compared.checkpoint.config.eos_token_id[0]
    forced = [[end] * compared.max_new_tokens] * 3
    assert [len(row) for row in drive(compared, clean, forced=forced).tokens] == [compared.max_new_tokens] * 3


def test_the_cache_holds_every_position_of_its_row_and_no_padding(compared, run):
    config = compared.checkpoint.config
    width = config.num_key_value_heads * config.head_dim
    assert len(run.caches) == 2 * config.num_hidden_layers
    for rows in run.caches.values():
        assert [row.shape for row in rows] == [(length, width) for length in compared.reference.lengths]


def test_an_export_without_a_cache_gives_the_same_tokens_and_no_caches(compared, without_cache, run):
    other = drive(compared, without_cache, use_cache=False)
    assert other.tokens == run.tokens
    assert other.caches == {}


@pytest.mark.parametrize(("use_cache", "batching"), list(product((True, False), ("static", "continuous"))))
def test_an_export_with_logits_of_the_last_token_alone_gives_the_same_tokens(
    compared, last_logits, run, use_cache, batching
):
    other = drive(compared, last_logits, use_cache=use_cache, batching=batching)
    assert other.tokens == run.tokens
    assert [len(logits) for logits in other.logits] == [compared.max_new_tokens] * 3
    for mine, whole in zip(other.logits, run.logits, strict=True):
        np.testing.assert_allclose(mine, whole[-compared.max_new_tokens :], atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("batching", SCHEDULES)
def test_forced_tokens_are_fed_whatever_the_candidate_chooses(compared, clean, run, use_cache, batching):
    forced = [[5, 4, 3, 2, 9, 8, 7, 6], [1, 2, 3, 4, 5, 6, 7, 8], [9] * 8]
    other = drive(compared, clean, use_cache=use_cache, forced=forced, batch_size=2, batching=batching)
    assert [row[0] for row in other.tokens] == [row[0] for row in run.tokens]  # nothing was forced before it
    weights = Weights.open(compared.checkpoint, np.float32)
    for prompt, mine, chosen in zip(compared.prompts, forced, other.tokens, strict=True):
        after_each = [[*prompt, *mine[:step]] for step in range(len(mine))]
        assert chosen == [generate(weights, [tokens], 1)[0][0] for tokens in after_each]


def test_each_step_tells_how_many_tokens_were_gained(compared, clean):
    gained: list[int] = []
    drive(compared, clean, batch_size=2, on_step=gained.append)
    assert gained == [2] * 8 + [1] * 8


@pytest.fixture(scope="module")
def candidate(compared, clean) -> OrtCandidate:
    return compared.open(clean)


@settings(max_examples=20)
@given(
    prompts=st.lists(st.lists(st.integers(0, 383), min_size=1, max_size=12), min_size=1, max_size=5),
    new=st.integers(1, 5),
    batches=st.fixed_dictionaries({"batching": st.sampled_from(list(SCHEDULES)), "batch_size": st.integers(1, 5)}),
    use_cache=st.booleans(),
)
def test_a_row_gets_the_logits_and_the_cache_that_it_gets_alone(candidate, prompts, new, batches, use_cache):
    forced = [[sum(prompt) % 384] * new for prompt in prompts]  # so that a near tie changes nothing that is fed
    in_order = Request(prompts, new, **batches).schedule
    schedule = [rows if step % 2 else rows[::-1] for step, rows in enumerate(in_order)]  # a step's order is nobody's
    together = run_candidate(candidate, prompts, schedule, use_cache=use_cache, forced=forced)
    for row, prompt in enumerate(prompts):
        alone = run_candidate(candidate, [prompt], [(0,)] * new, use_cache=use_cache, forced=forced[row : row + 1])
        np.testing.assert_allclose(together.logits[row], alone.logits[0], atol=1e-4)
        for name, (values,) in alone.caches.items():
            np.testing.assert_allclose(together.caches[name][row], values, atol=1e-4)


class Watched:
    """A candidate that notes the positions of past and new tokens of every pass."""

    def __init__(self, candidate: OrtCandidate):
        self.candidate = candidate
        self.interface = candidate.interface
        self.passes: list[list[list[int]]] = []

    def run(self, token_ids_BT, positions_BT, past=None):
        slots_BS = positions_BT if past is None else np.hstack([past.positions_BS, positions_BT])
        self.passes.append(slots_BS.tolist())
        return self.candidate.run(token_ids_BT, positions_BT, past)

    def caches(self, past):
        return self.candidate.caches(past)


def test_rows_of_different_steps_stand_in_one_batch_and_slots_that_nobody_needs_go(compared, clean):
    """A short row joins a long one; the long one leaves and takes its slots with it; another joins."""
    watched = Watched(compared.open(clean))
    run_candidate(watched, [[1, 2, 3, 4], [5], [6, 7]], [(0,), (0, 1), (1, 2), (2,)], use_cache=True)
    none = -1
    assert watched.passes == [
        [[0, 1, 2, 3]],
        [[0, 1, 2, 3, 4]],
        [[0]],
        [[0, 1]],
        [[0, 1]],
        [[0, 1, 2]],
    ]
    watched.passes.clear()
    run_candidate(watched, [[1, 2, 3, 4], [5], [6, 7]], [(0,), (0, 1), (0, 1, 2), (1, 2), (2,)], use_cache=True)
    assert watched.passes == [
        [[0, 1, 2, 3]],
        [[0, 1, 2, 3, 4]],
        [[0]],
        [[0, 1, 2, 3, 4, 5], [none, none, none, none, 0, 1]],
        [[0, 1]],
        [[0, 1, 2], [0, 1, 2]],
        [[0, 1, 2, 3]],
    ]
    watched.passes.clear()
    run_candidate(watched, [[1, 2, 3], [5]], [(0,), (0, 1), (1,)], use_cache=False)
    assert watched.passes == [[[0, 1, 2]], [[0, 1, 2, 3], [none, none, none, 0]], [[0, 1]]]


def test_one_new_token_needs_no_second_run(compared, clean, run):
    one = run_candidate(compared.open(clean), compared.prompts, [(0, 1, 2)], use_cache=True)
    assert one.tokens == [row[:1] for row in run.tokens]
    assert [len(logits) for logits in one.logits] == [len(prompt) for prompt in compared.prompts]


def test_a_runtime_that_fails_in_the_middle_gives_no_verdict(tmp_path):
    candidate = OrtCandidate.open(repeating_decoder(tmp_path / "model.onnx", heads=K), "ort-cpu", {}, ONE_LAYER)
    with pytest.raises(NoVerdict, match="ort-cpu failed"):
        run_candidate(candidate, [[1, 2]], [(0,)] * 3, use_cache=True, forced=[[3, 999, 3]])


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_a_past_built_with_query_heads_gives_no_verdict_where_it_is_to_be_carried_on(tmp_path, new_tokens):
    path = repeating_decoder(tmp_path / "model.onnx", heads=N, kv_heads="kv_heads")
    candidate = OrtCandidate.open(path, "ort-cpu", {}, ONE_LAYER)
    schedule = [(0,)] * new_tokens
    with pytest.raises(NoVerdict, match=r"6 is num_attention_heads and 2 num_key_value_heads: its past was built"):
        run_candidate(candidate, [[1, 2]], schedule, use_cache=True)
    without = run_candidate(candidate, [[1, 2]], schedule, use_cache=False)
    assert len(without.tokens[0]) == new_tokens
    assert without.caches == {}


def test_a_fixed_batch_that_does_not_divide_the_prompts_gives_no_verdict(compared, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", edit=take_two_rows)
    candidate = compared.open(path)
    assert candidate.interface.batch_size == 2
    prompts = [compared.prompts[0]] * 3
    with pytest.raises(NoVerdict, match=r"takes shape \[2, .*\] alone"):
        run_candidate(candidate, prompts, Request(prompts, 2, batch_size=2).schedule, use_cache=True)
