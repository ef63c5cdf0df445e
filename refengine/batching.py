"""Which requests are decoded together, and when each of them joins and leaves: static, dynamic, continuous.

Each request gets the tokens that it gets alone, whoever its neighbours are. What differs is how many steps it takes:

    static      a fixed number of requests in the order they came; the batch ends with its longest
    dynamic     as many requests of like length as a budget of cached tokens allows; the batch ends with its longest
    continuous  a request joins as soon as there is room, and leaves as soon as it has ended

Source: for continuous batching and chunked prefill, Orca (OSDI 2022) and Sarathi-Serve (arXiv 2403.02310).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from refengine.errors import RequestError
from refengine.generate import new_cache
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import OPS, Ops
from refengine.requests import Limits, check_request
from refengine.scheme import Scheme
from refengine.tokens import PADDING_ID, left_padded
from refengine.weights import Weights


@dataclass(frozen=True)
class Policy:
    """Who joins a batch, and when.

    Attributes:
        in_whole_batches: requests join an empty batch only, and their rows stay until all of them have ended.
        by_length: of those that wait, the shortest (prompt and new tokens together) come first.
    """

    in_whole_batches: bool
    by_length: bool


STATIC = Policy(in_whole_batches=True, by_length=False)
DYNAMIC = Policy(in_whole_batches=True, by_length=True)
CONTINUOUS = Policy(in_whole_batches=False, by_length=False)


@dataclass(frozen=True)
class NewToken:
    """A token that a step gave to a request, and whether it is its last."""

    id: int
    token: int
    last: bool


@dataclass
class _Row:
    """A request on its way."""

    id: int
    prompt: list[int]
    max_new_tokens: int
    read: int = 0  # prompt tokens that are in the cache
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def most_tokens(self) -> int:
        """In the cache at the end: the last new token is never fed."""
        return len(self.prompt) + self.max_new_tokens - 1


class Batching:
    """Decodes requests greedily, many at a time. `step` until `unfinished` is 0; requests may come and go meanwhile.

    A step reads the prompts of newcomers and decodes one token for each row of the running batch. The
    newcomers' caches are then merged into the running one, and the rows that go on are selected from it.

    Args:
        weights: the model.
        policy: STATIC, DYNAMIC or CONTINUOUS.
        limits: what a batch may take.
        scheme: how the cache is stored; the weights' dtype by default.
        ops: the operators.
    """

    def __init__(
        self,
        weights: Weights,
        policy: Policy = CONTINUOUS,
        limits: Limits | None = None,
        *,
        scheme: Scheme | None = None,
        ops: Ops = OPS,
    ):
        self.weights = weights
        self.policy = policy
        self.limits = limits or Limits()
        self.scheme = scheme
        self.ops = ops
        self._known: set[int] = set()
        self._waiting: list[_Row] = []
        self._reading: list[_Row] = []  # their prompts are not all in the cache yet
        self._partly_read: KVCache | None = None  # of the first of them
        self._running: list[_Row] = []  # row i of the cache is that of the i-th
        self._cache = self._empty_cache(0)

    def add_request(self, prompt: Sequence[int], max_new_tokens: int, id: int | None = None) -> int:
        """Takes a request and returns its id, the next free number unless one is given.

        Raises:
            RequestError: it can never be met, or its id was used before; the other requests are not touched.
        """
        if id in self._known:
            raise RequestError(f"request {id}: this id was used before; give another, or none")
        number = max(self._known, default=-1) + 1 if id is None else id
        check_request(self.weights.config, prompt, max_new_tokens, self.limits, f"request {number}")
        self._known.add(number)
        self._waiting.append(_Row(number, [int(token) for token in prompt], max_new_tokens))
        return number

    def cancel(self, id: int) -> None:
        """Ends a request: it gets no more tokens, and its row and memory are free as if it had ended by itself.

        Raises:
            RequestError: nobody of that id is waiting or running, since it never came, has ended, or was cancelled.
        """
        row = next((row for row in self._unfinished() if row.id == id), None)
        if row is None:
            why = "it has ended or was cancelled" if id in self._known else "it never came"
            raise RequestError(f"request {id}: cannot be cancelled: {why}")
        row.ended = True
        self._let_go()

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return sum(1 for _ in self._unfinished())

    @property
    def running(self) -> int:
        """Rows of the running batch; with whole batches, those that have ended are among them."""
        return len(self._running)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return self._cache.nbytes + (self._partly_read.nbytes if self._partly_read else 0)

    def step(self) -> list[NewToken]:
        """One step: at most one new token for every request in the batch, in the order in which they joined."""
        self._admit()
        decoded = self._decode()
        arrived, caches = self._prefill()
        self._running += arrived
        for cache in caches:
            self._cache = self._cache.merge(cache)
        self._let_go()
        return decoded + [NewToken(row.id, row.tokens[-1], row.ended) for row in arrived]

    def _unfinished(self) -> Iterator[_Row]:
        return (row for row in [*self._waiting, *self._reading, *self._running] if not row.ended)

    def _empty_cache(self, rows: int) -> KVCache:
        return new_cache(self.weights, rows, self.scheme)

    def _let_go(self) -> None:
        """Drops what has ended; a running batch's rows at once, or with whole batches when the last of them has."""
        self._waiting = [row for row in self._waiting if not row.ended]
        if self._reading and self._reading[0].ended:
            self._partly_read = None
        self._reading = [row for row in self._reading if not row.ended]
        going_on = [place for place, row in enumerate(self._running) if not row.ended]
        if len(going_on) == len(self._running) or (self.policy.in_whole_batches and (going_on or self._reading)):
            return
        self._running = [self._running[place] for place in going_on]
        self._cache = self._cache.select(going_on)

    def _admit(self) -> None:
        """Moves requests from waiting to reading while there is room; the first who does not fit keeps its turn."""
        if self.policy.in_whole_batches and (self._running or self._reading):
            return
        if self.policy.by_length:
            self._waiting.sort(key=lambda row: row.most_tokens)
        while self._waiting and self._fits(self._waiting[0]):
            self._reading.append(self._waiting.pop(0))

    def _fits(self, row: _Row) -> bool:
        batch = [row, *self._reading, *self._running]
        longest = max(row.most_tokens for row in batch)
        if self.policy.in_whole_batches:  # the row of the longest prompt is padded while another goes on
            longest = max(len(row.prompt) for row in batch) + max(row.max_new_tokens for row in batch) - 1
        in_budget = self.limits.max_tokens is None or len(batch) * longest <= self.limits.max_tokens
        return in_budget and len(batch) <= self.limits.max_batch_size

    def _prefill(self) -> tuple[list[_Row], list[KVCache]]:
        """Reads prompts within the step's limit; returns the rows that are through, with their first token."""
        arrived, caches, budget = [], [], self.limits.max_prefill_tokens
        while self._reading and budget:
            rows = self._read_together(budget)
            cache = self._partly_read or self._empty_cache(len(rows))
            chunk = [row.prompt[row.read : row.read + budget] for row in rows]
            token_ids_BT, positions_BT = left_padded(chunk)
            positions_BT += np.where(positions_BT < 0, 0, np.array([[row.read] for row in rows]))
            logits_BTV = forward(self.weights, token_ids_BT, positions_BT, cache, last=True, ops=self.ops)
            budget = max(0, budget - token_ids_BT.size)
            for row, tokens in zip(rows, chunk, strict=True):
                row.read += len(tokens)
            if rows[0].read < len(rows[0].prompt):
                self._partly_read = cache
                break
            self._choose(rows, logits_BTV)
            self._reading, self._partly_read = self._reading[len(rows) :], None
            arrived += rows
            caches.append(cache)
        return arrived, caches

    def _read_together(self, budget: int) -> list[_Row]:
        """The prompts of the next pass: as many as fit whole, padding counted, or the first of them in part."""
        together = self._reading[:1]
        if self._partly_read is not None:
            return together
        for row in self._reading[1:]:
            longest = max(len(other.prompt) for other in [*together, row])
            if longest * (len(together) + 1) > budget:
                break
            together.append(row)
        return together

    def _decode(self) -> list[NewToken]:
        """One token for each running row; rows that have ended and must stay are fed padding."""
        if not self._running or (self.policy.in_whole_batches and self._reading):
            return []
        going_on = [row for row in self._running if not row.ended]
        token_ids_B1 = np.array([[PADDING_ID if row.ended else row.tokens[-1]] for row in self._running])
        positions_B1 = np.array([[-1 if row.ended else len(row.prompt) + len(row.tokens) - 1] for row in self._running])
        logits_BTV = forward(self.weights, token_ids_B1, positions_B1, self._cache, last=True, ops=self.ops)
        self._choose(self._running, logits_BTV)
        return [NewToken(row.id, row.tokens[-1], row.ended) for row in going_on]

    def _choose(self, rows: Sequence[_Row], logits_BTV: np.ndarray) -> None:
        for row, token in zip(rows, logits_BTV[:, -1].argmax(axis=-1).tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                row.ended = len(row.tokens) == row.max_new_tokens or token in self.weights.config.eos_token_id


def complete(batching: Batching, on_token: Callable[[NewToken], None] = lambda new: None) -> dict[int, list[int]]:
    """Steps until nothing is left to do; returns each request's tokens of these steps, in the order of their ids."""
    tokens: dict[int, list[int]] = {}
    while batching.unfinished:
        for new in batching.step():
            tokens.setdefault(new.id, []).append(new.token)
            on_token(new)
    return dict(sorted(tokens.items()))
