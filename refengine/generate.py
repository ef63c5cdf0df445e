"""Greedy generation with and without a cache, or on from one, and teacher-forced logits for tokens that are given."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from refengine.kvcache import NO_CACHE, Cache, KVCache
from refengine.model import forward
from refengine.ops import OPS, Ops
from refengine.scheme import Scheme, stored_as
from refengine.tokens import left_padded
from refengine.trace import Trace, no_trace
from refengine.weights import Weights

OnToken = Callable[[int, int], None]  # (row, token), called as each token is chosen


def new_cache(weights: Weights, batch_size: int, scheme: Scheme | None = None) -> KVCache:
    """An empty cache in the weights' dtype unless a scheme is given, holding no more than the model's window."""
    return KVCache(weights.config, batch_size, scheme or stored_as(weights.dtype), weights.config.sliding_window)


def generate(
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    cache: bool = True,
    scheme: Scheme | None = None,
    ops: Ops = OPS,
    on_token: OnToken = lambda row, token: None,
) -> list[list[int]]:
    """The tokens that greedy decoding appends to each prompt; an end token is the last of its row.

    Args:
        prompts: token ids, of any lengths; decoded as one left-padded batch.
        cache: False feeds the whole sequence again at each step.
        scheme: how the cache is stored; the weights' dtype by default.
        on_token: called with (row, token) as each token is chosen.
    """
    kept = new_cache(weights, len(prompts), scheme) if cache else None
    return decode(weights, *left_padded(prompts), max_new_tokens, kept, ops=ops, on_token=on_token)


def decode(
    weights: Weights,
    token_ids_BT: np.ndarray,
    positions_BT: np.ndarray,
    max_new_tokens: int,
    kept: KVCache | None,
    *,
    ops: Ops = OPS,
    on_token: OnToken = lambda row, token: None,
) -> list[list[int]]:
    """The tokens that greedy decoding appends to each row of a batch; an end token is the last of its row.

    Args:
        token_ids_BT: of each row, what `kept` does not hold yet; the last column has no padding.
        positions_BT: their positions, on from those in `kept`.
        kept: the rows' tokens so far, perhaps none. As long as no row has ended, it is given all tokens but the newest
            (with one row: all but the last that is returned). None feeds the whole sequence again at each step.
        on_token: called with (row, token) as each token is chosen.
    """
    generated: list[list[int]] = [[] for _ in token_ids_BT]
    rows = list(range(len(generated)))  # those that have not ended, in the order of the batch
    for _ in range(max_new_tokens):
        logits_BTV = forward(weights, token_ids_BT, positions_BT, kept or NO_CACHE, last=True, ops=ops)
        chosen_B = logits_BTV[:, -1].argmax(axis=-1)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            generated[row].append(token)
            on_token(row, token)
        # Fed next: the new tokens alone where a cache keeps the others, else all of them again.
        fed_before = slice(None) if kept is None else slice(0)
        token_ids_BT = np.append(token_ids_BT[:, fed_before], chosen_B[:, None], axis=1)
        positions_BT = np.append(positions_BT[:, fed_before], positions_BT[:, -1:] + 1, axis=1)
        going_on = np.flatnonzero(~np.isin(chosen_B, weights.config.eos_token_id))
        if len(going_on) == len(rows):
            continue
        rows = [rows[place] for place in going_on]
        if not rows:
            break
        token_ids_BT, positions_BT = token_ids_BT[going_on], positions_BT[going_on]
        kept = kept.select(going_on) if kept is not None else None
    return generated


def teacher_forced(
    weights: Weights,
    token_ids_BT: np.ndarray,
    positions_BT: np.ndarray,
    cache: Cache,
    *,
    chunk: int = 512,
    ops: Ops = OPS,
    trace: Trace = no_trace,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Logits for tokens that are given, `chunk` columns at a time: pairs of the columns and their `logits_BTV`.

    One pass over prompt and continuation gives the reference's choice at every step without decoding step by step.
    Memory is bounded by the chunk; `cache` receives the keys and values.
    """
    for start in range(0, token_ids_BT.shape[1], chunk):
        columns = slice(start, min(start + chunk, token_ids_BT.shape[1]))
        yield (
            columns,
            forward(weights, token_ids_BT[:, columns], positions_BT[:, columns], cache, ops=ops, trace=trace),
        )
