"""Whoever is decoded together: each request gets the tokens, and the logits, that it gets alone without a cache."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.batching import CONTINUOUS, DYNAMIC, STATIC, Batching, complete
from refengine.errors import RequestError
from refengine.requests import Limits
from refengine.weights import Weights
from tests.refengine.sessions import PLENTY, Session, alone_of, session
from tests.refengine.strategies import VOCABULARY, opened, written

POLICIES = pytest.mark.parametrize("policy", [STATIC, DYNAMIC, CONTINUOUS], ids=["static", "dynamic", "continuous"])
LONGEST = 26  # prompt and new tokens of the longest request below

limits = st.builds(
    Limits,
    max_batch_size=st.integers(1, 4),
    max_tokens=st.none() | st.integers(LONGEST, 4 * LONGEST),
    max_prefill_tokens=st.integers(1, 20),
)
requests = st.tuples(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=16), st.integers(1, 10))


@POLICIES
@given(limits=limits, given=st.lists(requests, min_size=1, max_size=7))
def test_requests_that_come_together_get_the_tokens_that_each_gets_alone(model, policy, limits, given):
    made = session(model, policy, limits, given)
    made.finish()
    made.check()
    assert made.batching.nbytes == 0


actions = st.lists(
    st.one_of(requests, st.integers(0, 8).map(lambda number: ("cancel", number)), st.just("step")), max_size=25
)


@POLICIES
@given(limits=limits, schedule=actions)
def test_under_any_schedule_of_arrivals_and_cancellations_too(model, policy, limits, schedule):
    made = session(model, policy, limits)
    for action in schedule:
        if action == "step":
            made.step()
        elif action[0] == "cancel":
            made.cancel(action[1])
        else:
            made.add(action)
    made.finish()
    made.check()
    assert made.batching.nbytes == 0


@POLICIES
@given(limits=limits, given=st.lists(requests, min_size=1, max_size=7))
def test_no_limit_is_ever_passed(model, policy, limits, given):
    made = session(model, policy, limits, given)
    token_bytes = 2 * 8 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    while made.batching.unfinished:
        made.step()
        assert made.batching.running + len(made.batching._reading) <= limits.max_batch_size
        if limits.max_tokens is not None:
            assert made.batching.nbytes <= limits.max_tokens * token_bytes


@POLICIES
def test_complete_gives_the_tokens_in_the_order_of_the_requests(model, policy):
    given = [([1, 2, 3, 4, 5], 6), ([7], 9), ([8, 9], 2)]
    batching = Batching(model, policy, Limits(max_batch_size=2))
    for prompt, most in given:
        batching.add_request(prompt, most)
    came = []
    tokens = complete(batching, came.append)
    assert tokens == {number: alone_of(model, *request) for number, request in enumerate(given)}
    assert [new.token for new in came if new.id == 1] == tokens[1]


def endless(weights: Weights) -> Weights:
    """The model without end tokens, so that every request takes what it asks for."""
    return replace(weights, config=replace(weights.config, eos_token_id=()))


def steps_of(made: Session) -> int:
    steps = 0
    while made.batching.unfinished:
        made.step()
        steps += 1
    return steps


def test_static_batches_end_with_their_longest_and_continuous_ones_do_not_wait(model):
    given = [([3, number], 100 if number % 8 == 0 else 10) for number in range(32)]
    steps = {
        policy: steps_of(session(endless(model), policy, Limits(max_batch_size=8), given))
        for policy in (STATIC, CONTINUOUS)
    }
    assert steps[STATIC] == 400
    assert steps[CONTINUOUS] <= 140


def test_dynamic_batches_are_of_like_length_and_fill_the_budget(model):
    lengths = [2, 11, 3, 10, 2, 12]
    made = session(
        endless(model),
        DYNAMIC,
        Limits(max_batch_size=9, max_tokens=36),
        [([number], 9 * 0 + n) for number, n in enumerate(lengths)],
    )
    together = []
    while made.batching.unfinished:
        joined = {new.id for new in made.step()}
        if not any(joined & batch for batch in together):
            together.append(joined)
    assert together == [{0, 4, 2}, {3, 1, 5}]


def test_a_free_slot_goes_to_the_next_request_at_once(model):
    given = [([1], 5), ([2], 2), ([3], 4)]
    made = session(endless(model), CONTINUOUS, Limits(max_batch_size=2), given)
    assert [[new.id for new in made.step()] for _ in range(5)] == [[0, 1], [0, 1], [0, 2], [0, 2], [0, 2]]


def test_a_long_prompt_is_read_in_chunks_while_the_others_go_on(model):
    made = session(endless(model), CONTINUOUS, Limits(max_prefill_tokens=4), [([1], 9)])
    made.step()
    made.add((list(range(11)), 2))
    assert [[new.id for new in made.step()] for _ in range(4)] == [[0], [0], [0, 1], [0, 1]]


def test_when_a_long_row_leaves_the_others_do_not_keep_its_memory(tmp_path):
    model = opened(written(tmp_path))  # without a window, which would bound every row's memory already
    made = session(endless(model), CONTINUOUS, PLENTY, [(list(range(40)), 2), ([1, 2], 12), ([3], 12)])
    token_bytes = 2 * 8 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    made.step()
    assert made.batching.nbytes == 3 * 40 * token_bytes
    made.step()  # the long row's last
    assert made.batching.nbytes == 2 * 3 * token_bytes


def test_a_cancelled_request_gives_up_its_row_and_its_memory(model):
    made = session(endless(model), CONTINUOUS, PLENTY, [([1, 2, 3, 4, 5, 6], 9), ([2], 3)])
    made.step()
    before = made.batching.nbytes
    made.cancel(0)
    assert {new.id for new in made.step()} == {1}
    assert (made.batching.running, made.batching.unfinished) == (1, 1)
    assert made.batching.nbytes < before


REFUSED = {
    "an empty prompt": ({"prompt": []}, "expected a prompt of at least one token id, found []"),
    "no tokens": ({"prompt": ["a"]}, "expected a prompt of at least one token id, found ['a']"),
    "a bad token": ({"prompt": [1, 67]}, "expected token ids from 0 to 66, found 67"),
    "a negative token": ({"prompt": [-1]}, "expected token ids from 0 to 66, found -1"),
    "nothing to do": ({"max_new_tokens": 0}, "expected at least 1 new token, found 0"),
    "more than the context": (
        {"max_new_tokens": 128},
        "2 prompt tokens and 128 new ones exceed max_position_embeddings 128",
    ),
    "more than the limit": ({"max_new_tokens": 30}, "needs 31 tokens in the cache, and max_tokens allows 30"),
    "an id that is taken": ({"id": 0}, "request 0: this id was used before"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_can_never_be_met_is_refused_alone(model, name):
    given, says = REFUSED[name]
    made = session(model, CONTINUOUS, Limits(max_tokens=30), [([5, 6], 4)])
    with pytest.raises(RequestError) as error:
        made.batching.add_request(**{"prompt": [1, 2], "max_new_tokens": 3, **given})
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    made.finish()
    made.check()


@pytest.mark.parametrize(("id", "why"), [(0, "it has ended or was cancelled"), (9, "it never came")])
def test_cancelling_who_is_not_there_is_refused_and_touches_nobody(model, id, why):
    made = session(model, CONTINUOUS, PLENTY, [([5, 6], 1), ([7], 4)])
    made.step()
    with pytest.raises(RequestError, match=f"request {id}: cannot be cancelled: {why}"):
        made.batching.cancel(id)
    made.finish()
    made.check()


def test_a_request_cannot_be_cancelled_twice(model):
    made = session(model, CONTINUOUS, PLENTY, [([5, 6], 4)])
    made.cancel(0)
    with pytest.raises(RequestError, match="has ended or was cancelled"):
        made.batching.cancel(0)


@pytest.mark.parametrize("wrong", [{"max_batch_size": 0}, {"max_tokens": 1}, {"max_prefill_tokens": -1}])
def test_limits_that_no_request_can_meet_are_refused(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Limits(**wrong)


def test_a_request_may_bring_an_id_of_its_own(model):
    batching = Batching(model)
    assert [batching.add_request([1], 1, id=7), batching.add_request([2], 1)] == [7, 8]
    assert list(complete(batching)) == [7, 8]
