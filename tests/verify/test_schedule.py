"""Who is decoded together: every row for as long as it takes, in batches within their limits."""

from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.generate_many import POLICIES
from refengine.requests import Limits
from verify.schedule import SCHEDULES, continuous, dynamic, is_padded, static

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=12)
new_tokens = st.integers(1, 8)
batch_sizes = st.integers(1, 13)
ONE_AT_A_TIME = Limits(max_batch_size=1)


def test_the_batchings_are_those_of_the_engine():
    assert list(SCHEDULES) == list(POLICIES)


@pytest.mark.parametrize("batching", SCHEDULES)
@given(lengths=lengths, new=new_tokens, size=batch_sizes, data=st.data())
def test_every_row_gains_its_tokens_in_steps_on_end_within_the_limits(batching, lengths, new, size, data):
    longest = max(lengths) + new - 1
    most = data.draw(st.integers(max(longest, 2), 3 * longest + 2) | st.none()) if batching == "dynamic" else None
    schedule = SCHEDULES[batching](lengths, new, Limits(size, most))
    for row in range(len(lengths)):
        steps = [step for step, rows in enumerate(schedule) if row in rows]
        assert steps == list(range(steps[0], steps[0] + new))
    for rows in schedule:
        assert 1 <= len(set(rows)) == len(rows) <= size
        assert most is None or len(rows) * max(lengths[row] + new - 1 for row in rows) <= most


@given(lengths=lengths, new=new_tokens, size=batch_sizes)
def test_static_batches_are_as_the_prompts_came_and_all_full_but_the_last(lengths, new, size):
    batches = [rows for rows, _ in groupby(static(lengths, new, Limits(size)))]
    assert [row for rows in batches for row in rows] == list(range(len(lengths)))
    assert {len(rows) for rows in batches[:-1]} <= {size}


@given(lengths=lengths, new=new_tokens, size=batch_sizes)
def test_dynamic_batches_hold_rows_of_like_length_and_no_other_row_would_have_fitted(lengths, new, size):
    most = 2 * (max(lengths) + new - 1)
    batches = [rows for rows, _ in groupby(dynamic(lengths, new, Limits(size, most)))]
    in_order = [lengths[row] for rows in batches for row in rows]
    assert in_order == sorted(lengths)
    for rows, (following, *_) in pairwise(batches):
        assert len(rows) == size or (len(rows) + 1) * (lengths[following] + new - 1) > most


@given(lengths=lengths, new=new_tokens, size=batch_sizes)
def test_a_continuous_batch_gets_one_row_a_step_while_it_has_room_and_never_waits(lengths, new, size):
    schedule = continuous(lengths, new, Limits(size))
    before: set[int] = set()
    waiting = list(range(len(lengths)))
    for rows in schedule:
        joining = set(rows) - before
        assert sorted(joining) == waiting[: len(joining)]
        assert len(joining) == 1 or (not joining and (not waiting or len(rows) == size))
        waiting = waiting[len(joining) :]
        before = set(rows)
    assert not waiting


def test_rows_join_and_leave_one_by_one():
    assert continuous([4, 4, 4, 4], 3, Limits(2)) == [(0,), (0, 1), (0, 1), (1, 2), (2, 3), (2, 3), (3,)]
    assert static([4, 4, 4, 4], 2, Limits(3)) == [(0, 1, 2), (0, 1, 2), (3,), (3,)]
    assert dynamic([9, 2, 8, 3], 2, Limits(3, 20)) == [(1, 3), (1, 3), (2, 0), (2, 0)]


@given(lengths=lengths, new=new_tokens)
def test_nothing_is_padded_one_row_at_a_time(lengths, new):
    assert not any(is_padded(schedule(lengths, new, ONE_AT_A_TIME), lengths) for schedule in SCHEDULES.values())


@pytest.mark.parametrize(
    ("batching", "lengths", "batch_size", "padded"),
    [
        ("static", [3, 3], 2, False),
        ("static", [3, 4], 2, True),
        ("static", [3, 4], 1, False),
        ("static", [3, 3, 5, 5], 2, False),
        ("static", [3, 5, 5, 3], 3, True),
        ("dynamic", [3, 5, 5, 3], 2, False),
        ("dynamic", [3, 5, 5, 3], 3, True),
        ("continuous", [3, 3], 2, True),  # the second joins when the first has one token more
        ("continuous", [3, 4, 5], 3, False),  # and here has caught up
        ("continuous", [3, 3], 1, False),
    ],
)
def test_a_batch_is_padded_where_lengths_differ_in_it(batching, lengths, batch_size, padded):
    assert is_padded(SCHEDULES[batching](lengths, 4, Limits(batch_size)), lengths) == padded
