"""What each way of running the same computation is worth: batching, the cache, attention in blocks.

    python -m benchmarks.strategies MODEL

All are the reference engine in float32; each ratio is of two ways that give the same tokens, taking turns.
"""

import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.peers import alternate, machine
from refengine import OPS, Ops, Weights, forward, open_checkpoint
from refengine.batching import CONTINUOUS, STATIC, Batching, Policy, complete
from refengine.blockwise import BLOCKWISE
from refengine.generate import new_cache
from refengine.kvcache import NO_CACHE
from refengine.requests import Limits
from verify.truth.noise import attend_with_probabilities

PROMPT, SHORT, LONG, REQUESTS, BATCH = 16, 10, 100, 32, 8
POSITION, PREFILLED, ROUNDS = 512, 4096, 3
PREFILL_ROUNDS = 1  # a minute each
PLAIN = replace(OPS, attend=attend_with_probabilities)  # as it is written down: all scores at once


def main(model: Path, rounds: int = ROUNDS, prefilled: int = PREFILLED) -> None:
    """Prints a line for each pair."""
    weights = Weights.open(open_checkpoint(model))
    # Without end tokens, so that every request takes as many tokens as it asks for.
    weights = replace(weights, config=replace(weights.config, eos_token_id=()))
    print(machine())
    ways = {
        "static": lambda: batching_seconds(weights, STATIC, BATCH),
        "continuous": lambda: batching_seconds(weights, CONTINUOUS, BATCH),
        "one at a time": lambda: batching_seconds(weights, CONTINUOUS, 1),
    }
    seconds = alternate(ways, rounds)
    print(f"{REQUESTS} requests of {SHORT} tokens, one in 8 of {LONG}, batch of {BATCH}: {_text(seconds)}")
    for other in ("static", "one at a time"):
        print(f"ratio {seconds[other] / seconds['continuous']:.2f} {other} / continuous")

    seconds = alternate(
        {
            "without cache": lambda: step_seconds(weights, cached=False),
            "with cache": lambda: step_seconds(weights, cached=True),
        },
        rounds,
    )
    print(f"one token at position {POSITION}: {_text(seconds)}")
    print(f"ratio {seconds['without cache'] / seconds['with cache']:.1f} without cache / with cache")

    seconds = alternate(
        {
            "in blocks": lambda: prefill_seconds(weights, BLOCKWISE, prefilled),
            "all scores at once": lambda: prefill_seconds(weights, PLAIN, prefilled),
        },
        min(rounds, PREFILL_ROUNDS),
    )
    print(f"prefill of {prefilled}: {_text(seconds)}")
    print(f"ratio {seconds['in blocks'] / seconds['all scores at once']:.2f} in blocks / all scores at once")
    memory = {name: attention_bytes(weights, ops, prefilled) for name, ops in (("b", BLOCKWISE), ("p", PLAIN))}
    print(f"its attention: {memory['b'] / 1e6:.1f} MB in blocks, {memory['p'] / 1e6:.1f} MB at once")
    print(f"ratio {memory['b'] / memory['p']:.4f} in blocks / all scores at once")


def batching_seconds(weights: Weights, policy: Policy, batch_size: int) -> float:
    """Seconds to meet all requests."""
    batching = Batching(weights, policy, Limits(batch_size))
    random = np.random.default_rng(0)
    for number in range(REQUESTS):
        prompt = random.integers(0, weights.config.vocab_size, PROMPT).tolist()
        batching.add_request(prompt, SHORT if number % 8 else LONG)
    return _seconds(lambda: complete(batching))


def step_seconds(weights: Weights, cached: bool) -> float:
    """Seconds to the logits of the token at POSITION, those before it in the cache or fed again."""
    token_ids_1T = np.random.default_rng(0).integers(0, weights.config.vocab_size, (1, POSITION + 1))
    positions_1T = np.arange(POSITION + 1)[None]
    cache = new_cache(weights, 1) if cached else NO_CACHE
    if cached:
        forward(weights, token_ids_1T[:, :-1], positions_1T[:, :-1], cache, last=True)
    new = slice(-1, None) if cached else slice(None)
    return _seconds(lambda: forward(weights, token_ids_1T[:, new], positions_1T[:, new], cache, last=True))


def prefill_seconds(weights: Weights, ops: Ops, length: int) -> float:
    """Seconds to the logits of the last of so many tokens."""
    token_ids_1T = np.random.default_rng(0).integers(0, weights.config.vocab_size, (1, length))
    return _seconds(lambda: forward(weights, token_ids_1T, np.arange(length)[None], last=True, ops=ops))


def attention_bytes(weights: Weights, ops: Ops, length: int) -> int:
    """The most memory that one layer's attention holds at once while it prefills, its result included."""
    config, positions_1T = weights.config, np.arange(length)[None]
    q_1TNH = np.ones((1, length, config.num_attention_heads, config.head_dim), weights.dtype)
    kv_1KTH = np.ones((1, config.num_key_value_heads, length, config.head_dim), weights.dtype)
    tracemalloc.start()
    ops.attend(q_1TNH, kv_1KTH, kv_1KTH, positions_1T, positions_1T, config.sliding_window)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _text(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {taken:.3f} s" for name, taken in seconds.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
