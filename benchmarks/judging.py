"""Judging generated tokens by one teacher-forced pass, against decoding them step by step with the cache.

    python -m benchmarks.judging MODEL

Both are the reference engine in float32 on the same tokens, in turns; the ratio says what judging saves.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.peers import alternate, machine
from refengine import Weights, open_checkpoint
from refengine.generate import generate, new_cache, teacher_forced

PROMPT, GENERATED, ROUNDS = 16, 256, 5


def main(model: Path, generated: int = GENERATED, rounds: int = ROUNDS) -> None:
    """Prints the seconds of both and their ratio."""
    weights = Weights.open(open_checkpoint(model))
    # Without end tokens, so that as many tokens are decoded as are asked for.
    weights = replace(weights, config=replace(weights.config, eos_token_id=()))
    prompt = np.random.default_rng(0).integers(1, weights.config.vocab_size, PROMPT).tolist()
    (tokens,) = generate(weights, [prompt], generated)
    seconds = alternate(
        {
            "decoding": lambda: decoding_seconds(weights, prompt, generated),
            "judging": lambda: judging_seconds(weights, prompt, tokens),
        },
        rounds,
    )
    confirmed = sum(a == b for a, b in zip(choices(weights, prompt, tokens), tokens, strict=True))
    print(machine())
    print(f"{generated} tokens after {PROMPT}, float32, of which one pass confirms {confirmed}")
    print(f"decoding {seconds['decoding']:.3f} s, judging {seconds['judging']:.3f} s")
    print(f"ratio {seconds['decoding'] / seconds['judging']:.1f}")


def decoding_seconds(weights: Weights, prompt: Sequence[int], tokens: int) -> float:
    """Seconds to decode so many tokens one by one."""
    began = time.perf_counter()
    generate(weights, [prompt], tokens)
    return time.perf_counter() - began


def judging_seconds(weights: Weights, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Seconds from tokens that are given to the engine's choice at every step."""
    began = time.perf_counter()
    choices(weights, prompt, tokens)
    return time.perf_counter() - began


def choices(weights: Weights, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """What the engine chooses at every step when it is fed prompt and tokens, as a comparison's reference is."""
    token_ids_1T = np.array([[*prompt, *tokens[:-1]]])
    positions_1T = np.arange(token_ids_1T.shape[1])[None]
    passed = teacher_forced(weights, token_ids_1T, positions_1T, new_cache(weights, 1))
    chosen_T = np.concatenate([logits_1TV[0].argmax(axis=-1) for _, logits_1TV in passed])
    return chosen_T[-len(tokens) :].tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
