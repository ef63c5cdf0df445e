"""Arrays with an axis of slots, appended to in place."""

import numpy as np

Arrays = tuple[np.ndarray, ...]  # rows on axis 0, heads on axis 1, slots on axis 2; what follows differs


class Slots:
    """Arrays that share rows and slots. They grow by doubling, are written in place, and are shortened at both ends.

    Args:
        arrays: what is held at first; they are copied when something is appended.
    """

    def __init__(self, arrays: Arrays):
        self._arrays = arrays
        self._start, self._end = 0, arrays[0].shape[2]  # the slots in use; those before _start are dropped

    def __len__(self) -> int:
        return self._end - self._start

    @property
    def rows(self) -> int:
        """Of every array."""
        return self._arrays[0].shape[0]

    @property
    def held(self) -> Arrays:
        """Views of the slots in use, valid until the next append."""
        in_use = slice(self._start, self._end)
        return tuple([array[:, :, in_use] for array in self._arrays])

    @property
    def nbytes(self) -> int:
        """Bytes of the slots in use; spare capacity is not counted."""
        return sum(array.nbytes for array in self.held)

    def append(self, new: Arrays) -> None:
        """Adds slots behind the newest; values are rounded to the arrays' own dtypes."""
        end = self._end + new[0].shape[2]
        if end > self._arrays[0].shape[2]:
            # What drops slots moves on through its buffer: twice the size makes the move to the front rare.
            wanted = end - self._start
            self._move_to(_power_of_two(2 * wanted if self._start else wanted))
            end = wanted
        for array, x in zip(self._arrays, new, strict=True):
            array[:, :, self._end : end] = x
        self._end = end

    def drop(self, slots: int) -> None:
        """Forgets the oldest, and gives back memory when little is left."""
        self._start += slots
        if self._arrays[0].shape[2] > 8 * max(len(self), 1):
            self._move_to(_power_of_two(2 * len(self)))

    def crop(self, length: int) -> None:
        """Forgets the newest, so that `length` are left."""
        self._end = self._start + length

    def taken(self, rows_R: np.ndarray, slots_S: np.ndarray, before: int = 0) -> "Slots":
        """These rows and slots, copied, behind `before` slots of zeros."""
        return Slots(tuple(_taken(array, rows_R, slots_S, before) for array in self.held))

    def stacked(self, other: "Slots") -> "Slots":
        """The rows of both, which hold as many slots, this one's first."""
        return Slots(tuple(np.concatenate(pair) for pair in zip(self.held, other.held, strict=True)))

    def _move_to(self, capacity: int) -> None:
        moved = tuple(np.empty((*array.shape[:2], capacity, *array.shape[3:]), array.dtype) for array in self._arrays)
        for into, source in zip(moved, self.held, strict=True):
            into[:, :, : len(self)] = source
        self._arrays, self._start, self._end = moved, 0, len(self)


def _taken(array: np.ndarray, rows_R: np.ndarray, slots_S: np.ndarray, before: int) -> np.ndarray:
    taken = np.empty((len(rows_R), array.shape[1], before + len(slots_S), *array.shape[3:]), array.dtype)
    taken[:, :, :before] = 0  # what is hidden is multiplied by zero, so it has to be finite
    taken[:, :, before:] = array[rows_R[:, None], :, slots_S[None, :]].swapaxes(1, 2)
    return taken


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
