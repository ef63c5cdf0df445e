"""What a batch may take, and which requests can be met within it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refengine.config import Config
from refengine.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """What a batch may take.

    Attributes:
        max_batch_size: requests in the batch, those whose prompts are being read included.
        max_tokens: slots of the cache: requests in the batch times the longest of them, new tokens included, since
            shorter rows are padded to it. None: as many as the requests need.
        max_prefill_tokens: prompt tokens that one step may read, so that a long prompt does not hold up the others.
    """

    max_batch_size: int = 8
    max_tokens: int | None = None
    max_prefill_tokens: int = 512

    def __post_init__(self) -> None:
        for name, value in (("max_batch_size", self.max_batch_size), ("max_prefill_tokens", self.max_prefill_tokens)):
            if value < 1:
                raise RequestError(f"{name}: expected at least 1, found {value}; no request could ever be met")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise RequestError(
                f"max_tokens: expected at least 2 (a prompt and a new token), found {self.max_tokens}; no request "
                "could ever be met"
            )


def check_request(
    config: Config, prompt: Sequence[int], max_new_tokens: int, limits: Limits | None = None, name: str = "request"
) -> None:
    """Raises RequestError, whose text begins with `name`, when a request can never be met."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise RequestError(f"{name}: expected a prompt of at least one token id, found {list(prompt)!r}")
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if wrong.size:
        raise RequestError(f"{name}: expected token ids from 0 to {config.vocab_size - 1}, found {wrong[0]}")
    if max_new_tokens < 1:
        raise RequestError(f"{name}: expected at least 1 new token, found {max_new_tokens}")
    needed = len(ids) + max_new_tokens - 1
    if needed > config.max_position_embeddings:
        raise RequestError(
            f"{name}: {len(ids)} prompt tokens and {max_new_tokens} new ones exceed max_position_embeddings "
            f"{config.max_position_embeddings}; shorten the prompt or ask for fewer"
        )
    if limits is not None and limits.max_tokens is not None and needed > limits.max_tokens:
        raise RequestError(
            f"{name}: needs {needed} tokens in the cache, and max_tokens allows {limits.max_tokens}; shorten the "
            "prompt, ask for fewer, or raise the limit"
        )
