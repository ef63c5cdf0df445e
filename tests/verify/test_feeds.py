"""What an export is fed, and what of its outputs the next step is fed."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.tokens import left_padded
from tests.verify.declared import (
    CONFIG,
    H,
    K,
    cached_interface,
    inputs,
    outputs,
    past_of,
    presents,
    without,
)
from verify.candidates import Past
from verify.errors import NoVerdict
from verify.feeds import caches, feed, merge, next_past, select
from verify.interface import Declared, interface_of

ONE = np.array([[4]])  # one row of one token


def test_an_export_without_a_cache_is_fed_tokens_alone():
    interface = interface_of(inputs(layers=0), outputs(layers=0))
    assert set(feed(interface, ONE, np.array([[0]]))) == {"attention_mask", "input_ids", "position_ids"}


def test_a_present_that_no_past_takes_is_not_fed():
    interface = interface_of(inputs(layers=0), outputs())
    assert set(feed(interface, ONE, np.array([[0]]))) == {"attention_mask", "input_ids", "position_ids"}


def test_nothing_is_fed_that_the_export_does_not_declare():
    tokens = without(without(inputs(layers=0), "position_ids"), "attention_mask")
    interface = interface_of(tokens, outputs(layers=0))
    fed = feed(interface, np.array([[4, 5]]), np.array([[0, 1]]))
    assert {name: array.tolist() for name, array in fed.items()} == {"input_ids": [[4, 5]]}


def test_every_input_is_fed_in_the_dtype_that_it_declares():
    tokens = [Declared("input_ids", "int32", ("b", "t")), Declared("attention_mask", "bool", ("b", "s"))]
    half = inputs(dtype="float16")
    interface = interface_of([*tokens, *half[2:]], outputs(dtype="float16"))
    fed = feed(interface, np.array([[5, 6]], np.int64), np.array([[0, 1]], np.int32))
    declared = {declared.name: declared.dtype for declared in interface.inputs}
    assert {name: array.dtype.name for name, array in fed.items()} == declared


def test_a_first_step_is_fed_a_cache_of_length_0_of_the_checkpoints_sizes():
    interface = cached_interface(kv_heads="heads", head_dim="kv_cache_dim").resolved(CONFIG)
    fed = feed(interface, np.zeros((3, 2), np.int64), np.tile([0, 1], (3, 1)))
    assert {fed[name].shape for name, _ in interface.carried} == {(3, K, 0, H)}


def test_the_attention_mask_covers_past_and_present_and_leaves_padding_out():
    interface = cached_interface()
    past = past_of(interface, np.array([[-1, -1, 0], [0, 1, 2]]))
    fed = feed(interface, np.array([[7, 8], [9, 3]]), np.array([[1, 2], [3, 4]]), past)
    np.testing.assert_array_equal(fed["attention_mask"], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(fed["position_ids"], [[1, 2], [3, 4]])
    assert all(fed[name] is array for name, array in past.arrays.items())


def test_padding_is_fed_a_position_that_every_table_has():
    fed = feed(cached_interface(), np.array([[0, 0, 4]]), np.array([[-1, -1, 0]]))
    np.testing.assert_array_equal(fed["attention_mask"], [[0, 0, 1]])
    np.testing.assert_array_equal(fed["position_ids"], [[0, 0, 0]])


def test_padding_now_or_earlier_is_refused_by_an_export_that_cannot_be_told_of_it():
    interface = interface_of(without(inputs(), "attention_mask"), outputs())
    with pytest.raises(NoVerdict, match="attention_mask: the export has no such input"):
        feed(interface, np.array([[4, 5]]), np.array([[-1, 0]]))
    with pytest.raises(NoVerdict, match="attention_mask: the export has no such input"):
        feed(interface, ONE, np.array([[1]]), past_of(interface, np.array([[-1, 0]])))


@pytest.mark.parametrize(("declared", "shape"), [((), ()), ((1,), (1,)), (("n",), (1,))])
def test_num_logits_to_keep_asks_for_the_logits_of_every_token(declared, shape):
    keep = Declared("num_logits_to_keep", "int64", declared)
    fed = feed(interface_of([*inputs(layers=0), keep], outputs(layers=0)), ONE, np.array([[0]]))
    kept = fed["num_logits_to_keep"]
    assert (kept.shape, kept.dtype, kept.item()) == (shape, np.int64, 0)


def test_use_cache_branch_says_whether_there_is_a_past():
    interface = interface_of([*inputs(), Declared("use_cache_branch", "bool", (1,))], outputs())
    first = feed(interface, ONE, np.array([[0]]))
    later = feed(interface, ONE, np.array([[1]]), past_of(interface, np.array([[0]])))
    assert (first["use_cache_branch"].tolist(), later["use_cache_branch"].tolist()) == ([False], [True])


def test_a_fixed_size_that_the_batch_does_not_have_is_named():
    interface = interface_of([Declared("input_ids", "int64", (1, "t")), *inputs()[1:]], outputs())
    assert interface.batch_size == 1
    message = "input_ids: the export takes shape [1, t] alone, and would be fed [2, 1]"
    with pytest.raises(NoVerdict, match=re.escape(message)):
        feed(interface, np.array([[4], [5]]), np.array([[0], [0]]))


def test_an_interface_with_open_sizes_is_not_fed_guesses():
    with pytest.raises(ValueError, match="resolved"):
        feed(cached_interface(kv_heads="heads"), ONE, np.array([[0]]))


def test_the_next_past_is_the_present_under_the_names_of_the_past():
    interface = cached_interface()
    past = next_past(interface, presents(interface, 2), np.array([[-1, 0]]))
    later = next_past(interface, presents(interface, 3), np.array([[1]]), past)
    np.testing.assert_array_equal(later.positions_BS, [[-1, 0, 1]])
    found = {name: int(array.flat[0]) for name, array in later.arrays.items()}
    keys = {f"past_key_{n}": 2 * n for n in range(12)}
    values = {f"past_value_{n}": 2 * n + 1 for n in range(12)}
    assert found == keys | values


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_the_mask_of_every_step_is_as_long_as_all_that_was_fed(lengths):
    interface, past, total = cached_interface(layers=1), None, 0
    for length in lengths:
        positions_BT = np.arange(total, total + length)[None]
        fed = feed(interface, np.zeros_like(positions_BT), positions_BT, past)
        assert fed["past_key_0"].shape == (1, K, total, H)
        total += length
        np.testing.assert_array_equal(fed["attention_mask"], np.ones((1, total)))
        past = next_past(interface, presents(interface, total), positions_BT, past)


def test_the_next_past_does_not_change_when_the_runtime_writes_its_buffers_again():
    interface = cached_interface()
    given, positions_BT = presents(interface, 2), np.array([[0, 1]])
    past = next_past(interface, given, positions_BT)
    for array in (*given.values(), positions_BT):
        array.fill(-7)
    assert min(array.min() for array in past.arrays.values()) == 0
    np.testing.assert_array_equal(past.positions_BS, [[0, 1]])


@pytest.mark.parametrize("length", [1, 2, 4, 64])
def test_no_step_goes_on_from_a_present_of_another_length_than_past_and_new_tokens(length):
    interface = cached_interface()
    past = next_past(interface, presents(interface, length), np.array([[2]]), past_of(interface, np.array([[0, 1]])))
    assert caches(interface, past) == {}
    with pytest.raises(NoVerdict, match=re.escape(f"present_key_0: expected shape (1, {K}, 3, {H})")):
        feed(interface, ONE, np.array([[3]]), past)


def test_no_step_goes_on_from_a_present_of_another_dtype_than_the_past():
    interface = cached_interface()
    past = next_past(interface, presents(interface, 1, dtype="float16"), np.array([[0]]))
    with pytest.raises(NoVerdict, match="key_0: expected float32, as past_key_0 declares, found float16"):
        feed(interface, ONE, np.array([[1]]), past)


def rows_of(lengths: list[int], first: int = 0) -> Past:
    """A past of rows of these lengths, in which no two values are equal; numbered from `first`."""
    positions_BS = left_padded([[0] * length for length in lengths])[1]
    of_row = 1000.0 * np.arange(first, first + len(lengths))[:, None, None, None]
    vectors = of_row + 10 * (positions_BS[:, None, :, None] + 1) + np.arange(K * H).reshape(K, 1, H) / (K * H)
    vectors = np.where(positions_BS[:, None, :, None] < 0, 0, vectors).astype(np.float32)
    return Past({"key": vectors, "value": -vectors}, positions_BS)


def assert_row_is(past: Past, place: int, alone: Past) -> None:
    """A row is what it is alone, behind empty slots."""
    empty = past.positions_BS.shape[1] - alone.positions_BS.shape[1]
    np.testing.assert_array_equal(past.positions_BS[place], [-1] * empty + alone.positions_BS[0].tolist())
    for name, array in past.arrays.items():
        np.testing.assert_array_equal(array[place, :, empty:], alone.arrays[name][0])
        assert not array[place, :, :empty].any()
        assert array.dtype == np.float32


some_lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(mine=some_lengths, theirs=some_lengths, data=st.data())
def test_a_row_is_what_it_is_alone_whoever_joins_and_leaves(mine, theirs, data):
    merged = merge(rows_of(mine), rows_of(theirs, first=len(mine)))
    lengths = mine + theirs
    assert merged.positions_BS.shape == (len(lengths), max(lengths))
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    selected = select(merged, chosen)
    assert selected.positions_BS.shape == (len(chosen), max(lengths[row] for row in chosen))
    for past, rows in ((merged, range(len(lengths))), (selected, chosen)):
        for place, row in enumerate(rows):
            assert_row_is(past, place, rows_of([lengths[row]], first=row))


def test_merging_and_selecting_leave_what_they_were_given_as_it_was():
    first, second = rows_of([2, 3]), rows_of([5], first=2)
    merged = merge(first, second)
    selected = select(merged, [0, 1])
    for past in (merged, selected):
        assert not any(np.shares_memory(past.arrays[name], first.arrays[name]) for name in first.arrays)
    assert not np.shares_memory(selected.arrays["key"], merged.arrays["key"])
    for place, length in enumerate([2, 3]):
        assert_row_is(first, place, rows_of([length], first=place))
