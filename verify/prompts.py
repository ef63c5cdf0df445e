"""The built-in prompts of a comparison, and what every prompt of one has to be."""

from collections.abc import Sequence

import numpy as np

from refengine.config import Config
from refengine.errors import TokensError

# English of many lengths, so that a batch is ragged; with repeats, names and numbers, so that attention has work to do.
BUILT_IN = (
    "Today is a good day",
    "Return",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "If the expression is true, the first value is returned; otherwise",
    "In 1969, three people left for the Moon. Two of them walked on it, the third stayed in orbit. Their names were",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n",
    "A class definition is an executable statement. The inheritance list usually gives a list of "
    "base classes, so each item in "
    "the list should evaluate to a class object. Classes without an inheritance list inherit, by default, from",
    "Question: A train leaves at nine in the morning and travels eighty kilometres in every hour. "
    "Another one leaves an hour "
    "later from the same station, on the same line, and travels one hundred kilometres in every "
    "hour. When does the second "
    "train catch up with the first, and how far from the station are they then? Answer: Let us "
    "think about it step by step.",
)

LONGEST_PROBE = 1024  # tokens: a longer pass takes minutes of a reference that is also run in float64
USUAL_PROBE, SHORT_PROBE, BEYOND = 48, 3, 16


def probes(config: Config, max_new_tokens: int) -> list[list[int]]:
    """Prompts that show what the given ones may hide: a long one and a short one, so that a batch is padded.

    The long one goes beyond the sliding window, and beyond the length from which scaled RoPE differs, where that is not
    too far; always drawn alike, from all of the vocabulary.
    """
    rope = config.rope_parameters
    ends = [config.sliding_window or 0]
    if rope.rope_type != "default":
        ends.append(rope.original_max_position_embeddings or 0)
    reached = [end + BEYOND for end in ends if 0 < end + BEYOND <= LONGEST_PROBE]
    room = config.max_position_embeddings - max_new_tokens
    long = min(max([USUAL_PROBE, *reached]), room)
    random = np.random.default_rng(0)
    return [random.integers(0, config.vocab_size, min(length, room)).tolist() for length in (long, SHORT_PROBE)]


def check_prompts(prompts: Sequence[Sequence[int]], config: Config, max_new_tokens: int) -> None:
    """Raises TokensError at the first prompt that is empty, holds an id out of range, or leaves no room to decode."""
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise TokensError(f"prompt {number}: expected at least one token, found none")
        wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise TokensError(f"prompt {number}: expected token ids from 0 to {config.vocab_size - 1}, found {wrong}")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise TokensError(
                f"prompt {number}: {len(prompt)} tokens and {max_new_tokens} new ones exceed max_position_embeddings "
                f"{config.max_position_embeddings}; shorten it or lower --max-new-tokens"
            )
