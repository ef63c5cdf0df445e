"""The reference in the passes of a candidate that is fed one row at a time, for arithmetic that depends on them.

Where nothing is padded, rows may go through a pass side by side as if each were alone.
"""

from collections import defaultdict
from functools import reduce

import numpy as np

from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import Ops
from refengine.scheme import Scheme, stored_as
from refengine.tokens import Rows
from refengine.weights import Weights

TOKENS_A_PASS = 512  # bounds the logits held at a time
Given = tuple[np.ndarray, dict[str, np.ndarray]]  # logits, and keys and values by trace point, at every position


def rows_in_steps(weights: Weights, prompts: Rows, tokens: Rows, scheme: Scheme | None, ops: Ops) -> Given:
    """Each prompt is a pass, and so is each new token but the last.

    Args:
        tokens: new ones, of each row as many.
    """
    caches, logits = [], []
    for prompt in prompts:
        cache = KVCache(weights.config, 1, scheme or stored_as(weights.dtype))
        logits.append([forward(weights, np.array([prompt]), np.arange(len(prompt))[None], cache, ops=ops)[0]])
        caches.append(cache)
    cache = reduce(KVCache.merge, caches)
    for step, fed_B in enumerate(list(zip(*tokens, strict=True))[:-1]):
        positions_BT = np.array([[len(prompt) + step] for prompt in prompts])
        logits_BTV = forward(weights, np.array(fed_B)[:, None], positions_BT, cache, ops=ops)
        for row, logits_TV in zip(logits, logits_BTV, strict=True):
            row.append(logits_TV)
    return np.concatenate([logits_TV for row in logits for logits_TV in row]), held(cache, weights.dtype)


def rows_anew(weights: Weights, prompts: Rows, tokens: Rows, scheme: Scheme | None, ops: Ops) -> Given:
    """Each new token is chosen by a pass over all tokens before it, whose logits count where they are new.

    Keys and values are those of the last pass of each row. Args as in `rows_in_steps`.
    """
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)  # passes, as row and step
    for row, prompt in enumerate(prompts):
        for step in range(len(tokens[row])):
            by_length[len(prompt) + step].append((row, step))
    logits, last = {}, {}
    for length, passes in by_length.items():
        size = max(1, TOKENS_A_PASS // length)
        for some in (passes[start : start + size] for start in range(0, len(passes), size)):
            fed_BT = np.array([[*prompts[row], *tokens[row][:step]] for row, step in some])
            cache = KVCache(weights.config, len(some), scheme or stored_as(weights.dtype))
            positions_BT = np.broadcast_to(np.arange(length), fed_BT.shape)
            logits_BTV = forward(weights, fed_BT, positions_BT, cache, ops=ops)
            for place, (row, step) in enumerate(some):
                logits[row, step] = logits_BTV[place, -1:] if step else logits_BTV[place]
                if step == len(tokens[row]) - 1:
                    last[row] = held(cache.select([place]), weights.dtype)
    caches = [last[row] for row in range(len(prompts))]
    return (
        np.concatenate([logits[each] for each in sorted(logits)]),
        {name: np.concatenate([cache[name] for cache in caches]) for name in caches[0]},
    )


def held(cache: KVCache, dtype: np.typing.DTypeLike) -> dict[str, np.ndarray]:
    """Keys and values by trace point at every position of every row, rows one after the other, heads flattened."""
    there_BS = cache.positions_BS >= 0
    return {
        f"layers.{layer}.self_attn.{name}_cache": x_BKSH.swapaxes(1, 2)[there_BS].reshape(
            np.count_nonzero(there_BS), -1
        )
        for layer in range(cache.config.num_hidden_layers)
        for name, x_BKSH in zip("kv", cache.read(layer, dtype), strict=True)
    }
