"""The built-in prompts of a comparison, and what every prompt of one has to be."""

from collections.abc import Sequence

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
