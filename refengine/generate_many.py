"""`python -m refengine generate --prompts FILE`: many prompts in batches, and how long each had to wait."""

import argparse
import time
from collections.abc import Mapping, Sequence

import numpy as np

from refengine.batching import CONTINUOUS, DYNAMIC, STATIC, Batching, NewToken, Policy, complete
from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError, RequestError
from refengine.prompts import read_prompts
from refengine.quant import ops_for, scheme_for
from refengine.requests import Limits, check_request
from refengine.tokenizer import encode_prompt, load_tokenizer
from refengine.weights import Weights

POLICIES: Mapping[str, Policy] = {"static": STATIC, "dynamic": DYNAMIC, "continuous": CONTINUOUS}


def generate_many(options: argparse.Namespace) -> None:
    """Decodes every prompt of a file and prints its text, in their order, then rates and latencies.

    Raises:
        InputError: a prompt cannot be met, said after all others have been.
    """
    checkpoint = open_checkpoint(options.model)
    tokenizer = load_tokenizer(checkpoint.path)
    prompts = read_prompts(options.prompts, lambda text: encode_prompt(tokenizer, text, chat=options.chat))
    limits = Limits(options.batch_size, options.max_tokens)
    weights = Weights.open(checkpoint, resident=not options.streamed)
    accepted, refused = {}, []
    for number, prompt in enumerate(prompts, start=1):
        try:
            check_request(weights.config, prompt, options.max_new_tokens, limits, f"request {number}")
            accepted[number] = prompt
        except RequestError as error:
            refused.append(str(error))
    if not accepted:
        raise InputError("; ".join(refused))
    scheme = scheme_for(options.kv_cache, weights, list(accepted.values())[: options.batch_size])
    batching = Batching(weights, POLICIES[options.batching], limits, scheme=scheme, ops=ops_for(scheme))
    for number, prompt in accepted.items():
        batching.add_request(prompt, options.max_new_tokens, id=number)
    clock = _Clock()
    tokens = _with_bar(batching, clock)
    for number, new in tokens.items():
        print(f"[{number}] {tokenizer.decode(new, skip_special_tokens=True)}")
    print(clock.summary())
    if refused:
        raise InputError("; ".join(refused))


def _with_bar(batching: Batching, clock: "_Clock") -> dict[int, list[int]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("requests", total=batching.unfinished)

        def on_token(new: NewToken) -> None:
            clock(new)
            bars.advance(bar, int(new.last))

        return complete(batching, on_token)


class _Clock:
    """When each request got its tokens, counted from the start, when all of them came."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.times: dict[int, list[float]] = {}

    def __call__(self, new: NewToken) -> None:
        self.times.setdefault(new.id, []).append(time.perf_counter() - self.began)

    def summary(self) -> str:
        """One line: requests, tokens, rate, and the latency of first and of further tokens."""
        tokens = sum(map(len, self.times.values()))
        took = max(times[-1] for times in self.times.values())
        first = [times[0] for times in self.times.values()]
        further = [gap for times in self.times.values() for gap in np.diff(times).tolist()]
        rate = f"{len(self.times)} requests, {tokens} tokens, {tokens / took:.1f} tokens a second"
        return f"[{rate}; first token after {_spread(first)}" + (
            f"; each further one after {_spread(further)}]" if further else "]"
        )


def _spread(seconds: Sequence[float]) -> str:
    median, high = np.percentile(seconds, [50, 95])
    return f"{median * 1000:.0f} ms (median), {high * 1000:.0f} ms (95th percentile)"
