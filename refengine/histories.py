"""Stores in which what becomes of a token depends on its neighbours in time, so that each row has its own history."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from refengine.codecs.codec import Codec, check_finite
from refengine.slots import Slots
from refengine.views import Vectors, joined


@dataclass(frozen=True)
class Flow:
    """When tokens become codes.

    Attributes:
        sinks: the first tokens of a row, which never do.
        residual: so many of the newest wait, as they came. 0: each pass is coded before attention reads it, and a group
            of tokens that is not full is decoded, and coded again with those that join it.
        leaving: who becomes codes once attention has read a pass. "full": those that wait, by `residual` at a time.
            "oldest": those beyond the newest `residual`. "again": the first pass at once; later, each time `residual`
            wait, these and everything before, which is decoded and coded again.
        newest_counts: for "again", how many tokens those of the newest pass count for among those that wait; None: as
            many as there are.
    """

    sinks: int = 0
    residual: int = 0
    leaving: Literal["full", "oldest", "again"] = "full"
    newest_counts: int | None = None

    def coded(self, tokens: int) -> int:
        """How many of so many tokens of a row are codes, if they came one by one, or for "again" in one pass."""
        after_sinks = max(tokens - self.sinks, 0)
        if self.leaving == "oldest":
            return max(after_sinks - self.residual, 0)
        if self.leaving == "again" or not self.residual:
            return after_sinks
        return after_sinks - after_sinks % self.residual


AT_ONCE = Flow()


@dataclass
class History:
    """The tokens of one row, padding left out: the sinks, then codes, then those that wait.

    Attributes:
        begun: tokens that ever came, cropped ones not counted.
        coded: slots of `codec.tokens` tokens; the last one may be partly filled.
        n_coded: tokens in them.
        dropped: of these, tokens at the front that a window has dropped but which share a slot with others.
        newest: tokens of the newest pass.
    """

    codec: Codec
    flow: Flow
    sinks_1KTH: np.ndarray
    coded: Slots
    waiting_1KTH: np.ndarray
    begun: int = 0
    n_coded: int = 0
    dropped: int = 0
    newest: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything; of a slot that is partly filled, the scales and the codes that are there."""
        codes = self.coded.held[0]
        vacant = len(self.coded) * self.codec.tokens - self.n_coded
        each = codes[:, :, :1].nbytes // self.codec.tokens
        return self.sinks_1KTH.nbytes + self.coded.nbytes - vacant * each + self.waiting_1KTH.nbytes

    def copy(self) -> "History":
        """With codes of its own."""
        everything = np.arange(len(self.coded))
        return replace(self, coded=self.coded.taken(np.zeros(1, np.intp), everything))

    def append(self, x_1KTH: np.ndarray) -> None:
        """Adds tokens; they are coded at once, or wait."""
        sinks = max(self.flow.sinks - self.begun, 0)
        self.newest = x_1KTH.shape[2]
        self.begun += self.newest
        self.sinks_1KTH = np.concatenate([self.sinks_1KTH, x_1KTH[:, :, :sinks]], axis=2, dtype=x_1KTH.dtype)
        self._wait(x_1KTH[:, :, sinks:])
        if not self.flow.residual:
            self._reopen()
            self._code(self.waiting_1KTH.shape[2])

    def settle(self) -> None:
        """Codes those whose turn has come."""
        flow, waiting = self.flow, self.waiting_1KTH.shape[2]
        if flow.leaving == "oldest":
            self._code(max(waiting - flow.residual, 0))
        elif flow.leaving == "full" and flow.residual:
            self._code(waiting - waiting % flow.residual)
        elif flow.leaving == "again":
            counted = waiting if flow.newest_counts is None else waiting - self.newest + flow.newest_counts
            if not self.n_coded or counted >= flow.residual:
                self._open(0)
                self._code(self.waiting_1KTH.shape[2])

    def read(self, dtype: np.dtype) -> Vectors:
        """`x_1KTH` of all tokens, those dropped left out."""
        head_dim = self.waiting_1KTH.shape[-1]
        codes = self.codec.view(self.coded.held, self.n_coded, head_dim, dtype)[:, :, self.dropped :]
        return joined([self.sinks_1KTH.astype(dtype, copy=False), codes, self.waiting_1KTH.astype(dtype, copy=False)])

    def drop(self, tokens: int) -> None:
        """Forgets the oldest."""
        sinks = min(tokens, self.sinks_1KTH.shape[2])
        self.sinks_1KTH = self.sinks_1KTH[:, :, sinks:]
        codes = min(tokens - sinks, self.n_coded - self.dropped)
        self.dropped += codes
        self.waiting_1KTH = self.waiting_1KTH[:, :, tokens - sinks - codes :]
        slots = self.dropped // self.codec.tokens
        self.coded.drop(slots)
        self.dropped -= slots * self.codec.tokens
        self.n_coded -= slots * self.codec.tokens

    def crop(self, tokens: int) -> None:
        """Forgets so many of the newest. Those that are left of a group that is cut wait again, decoded."""
        self.begun -= tokens
        waiting = min(tokens, self.waiting_1KTH.shape[2])
        self.waiting_1KTH = self.waiting_1KTH[:, :, : self.waiting_1KTH.shape[2] - waiting]
        codes = min(tokens - waiting, self.n_coded)
        if codes:
            self.n_coded -= codes
            self.coded.crop(-(-self.n_coded // self.codec.tokens))
            if self.flow.residual:
                self._reopen()
        self.sinks_1KTH = self.sinks_1KTH[:, :, : self.sinks_1KTH.shape[2] - (tokens - waiting - codes)]

    def _wait(self, x_1KTH: np.ndarray) -> None:
        self.waiting_1KTH = np.concatenate([self.waiting_1KTH, x_1KTH], axis=2, dtype=x_1KTH.dtype)

    def _reopen(self) -> None:
        """The tokens of a last slot that is not full wait again."""
        if self.n_coded % self.codec.tokens:
            self._open(len(self.coded) - 1)

    def _open(self, slot: int) -> None:
        """Decodes this slot and those after it; their tokens wait in front of the others."""
        tokens = slot * self.codec.tokens
        if not self.n_coded:
            return
        held = tuple(array[:, :, slot:] for array in self.coded.held)
        decoded_1KTH = self.codec.decode(held, self.waiting_1KTH.dtype)[:, :, : self.n_coded - tokens]
        self.waiting_1KTH = np.concatenate([decoded_1KTH, self.waiting_1KTH], axis=2)
        self.coded.crop(slot)
        self.n_coded = tokens

    def _code(self, tokens: int) -> None:
        """The first of those that wait become codes."""
        if tokens:
            slots = self.codec.encode(self.waiting_1KTH[:, :, :tokens])
            if self.n_coded:
                self.coded.append(slots)
            else:  # a slot of a codec whose groups lie across all tokens is as large as these are many
                self.coded = Slots(slots)
            self.waiting_1KTH = self.waiting_1KTH[:, :, tokens:]
            self.n_coded += tokens


class HistoryStore:
    """A history for each row, and which slots of the cache its tokens are in."""

    def __init__(self, rows: list[History], there: Slots):
        self._rows, self._there = rows, there

    @property
    def nbytes(self) -> int:
        """Bytes of all rows. Which slots they are in is told by the cache's positions, and not counted."""
        return sum(row.nbytes for row in self._rows)

    def append(self, x_BKTH: np.ndarray, there_BT: np.ndarray) -> None:
        """Adds each row's tokens to its history."""
        self._there.append((there_BT[:, None],))
        for b, row in enumerate(self._rows):
            if there_BT[b].any():
                check_finite(x_BKTH[b, :, there_BT[b]])
                row.append(x_BKTH[b : b + 1, :, there_BT[b]])

    def read(self, dtype: np.dtype) -> Vectors:
        """A view of a row that has a token in every slot; else an array, with zeros where there is none."""
        there_BS = self._there.held[0][:, 0]
        if len(self._rows) == 1 and there_BS.all():
            return self._rows[0].read(dtype)
        rows = [np.asarray(row.read(dtype)) for row in self._rows]
        x_BKSH = np.zeros((len(rows), *rows[0].shape[1:2], there_BS.shape[1], rows[0].shape[3]), dtype)
        for x_KSH, there_S, row in zip(x_BKSH, there_BS, rows, strict=True):
            x_KSH[:, there_S] = row[0]
        return x_BKSH

    def settle(self) -> None:
        """Each row by itself."""
        for row in self._rows:
            row.settle()

    def drop(self, slots: int) -> None:
        """Forgets the oldest slots."""
        for row, there_S in zip(self._rows, self._there.held[0][:, 0, :slots], strict=True):
            row.drop(int(there_S.sum()))
        self._there.drop(slots)

    def crop(self, length: int) -> None:
        """Forgets the newest slots."""
        for row, there_S in zip(self._rows, self._there.held[0][:, 0, length:], strict=True):
            if there_S.any():
                row.crop(int(there_S.sum()))
        self._there.crop(length)

    def taken(self, rows_R: np.ndarray, slots_S: np.ndarray, before: int) -> "HistoryStore":
        """Copied."""
        return HistoryStore([self._rows[row].copy() for row in rows_R], self._there.taken(rows_R, slots_S, before))

    def stacked(self, other: "HistoryStore") -> "HistoryStore":
        """The histories stay as they are."""
        return HistoryStore(self._rows + other._rows, self._there.stacked(other._there))
