"""What a tensor inside a layer is taken for."""

import numpy as np
import pytest

from verify.locating.known import counts_slots, is_mask

POSITIONS_BT = np.array([[-1, -1, 0, 1], [0, 1, 2, 3]])  # two rows, one of them padded
ALLOWED_BTS = (POSITIONS_BT[:, None] >= 0) & (POSITIONS_BT[:, None] <= POSITIONS_BT[:, :, None])
LOW = np.float32(-65504)


def added(allowed: np.ndarray) -> np.ndarray:
    return np.where(allowed, np.float32(0), LOW)


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("form", [lambda allowed: allowed, added], ids=["of truths", "added"])
def test_a_mask_is_one_whether_or_not_each_head_has_a_copy(heads, form):
    mask = form(np.repeat(ALLOWED_BTS[:, None], heads, axis=1))
    assert is_mask(mask, POSITIONS_BT, POSITIONS_BT, None) is True


def test_a_mask_that_one_head_has_otherwise_is_wrong():
    mask = np.repeat(ALLOWED_BTS[:, None], 3, axis=1)
    mask[:, 2] = True
    assert is_mask(mask, POSITIONS_BT, POSITIONS_BT, None) is False


def test_scores_of_every_head_are_no_mask():
    scores = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    assert is_mask(scores, POSITIONS_BT, POSITIONS_BT, None) is None


@pytest.mark.parametrize(
    ("numbers", "are_slots"), [(range(7), True), (range(3, 7), True), (range(4), True), (range(1, 5), False)]
)
def test_numbers_of_slots_are_known_from_the_first_on_or_behind_the_past(numbers, are_slots):
    assert counts_slots(np.array(numbers), tokens=4, slots=7) is are_slots


def test_the_same_numbers_for_each_row_are_positions_and_no_slots():
    assert not counts_slots(np.stack([np.arange(4)] * 2), tokens=4, slots=4)
