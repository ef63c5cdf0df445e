"""Token ids and their positions: rows brought into one batch, and what a forward pass takes."""

from collections.abc import Sequence

import numpy as np

from refengine.errors import TokensError

Rows = Sequence[Sequence[int]]  # token ids
PADDING_ID = 0  # any valid token: at position -1 it is neither attended to nor counted


def left_padded(prompts: Rows) -> tuple[np.ndarray, np.ndarray]:
    """`token_ids_BT` and `positions_BT` of prompts that end in the same column; padding is in front, at position -1.

    Raises:
        TokensError: there is no prompt, or one is empty.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
        raise TokensError(
            "prompts: expected at least one token in each, found "
            f"{f'none in prompt {empty[0]}' if empty else 'no prompt'}"
        )
    longest = max(map(len, prompts))
    token_ids_BT = np.full((len(prompts), longest), PADDING_ID, np.int64)
    positions_BT = np.full((len(prompts), longest), -1, np.int64)
    for row, prompt in enumerate(prompts):
        token_ids_BT[row, longest - len(prompt) :] = prompt
        positions_BT[row, longest - len(prompt) :] = np.arange(len(prompt))
    return token_ids_BT, positions_BT


def check_tokens(token_ids_BT: np.ndarray, positions_BT: np.ndarray, vocab_size: int) -> None:
    """Raises TokensError at ids or positions of the wrong shape, type or range."""
    if token_ids_BT.ndim != 2 or token_ids_BT.size == 0 or token_ids_BT.dtype.kind not in "iu":
        raise TokensError(
            f"token ids: expected whole numbers of shape (batch, tokens), found {token_ids_BT.dtype} "
            f"{token_ids_BT.shape}"
        )
    if positions_BT.shape != token_ids_BT.shape or positions_BT.dtype.kind != "i" or positions_BT.min() < -1:
        raise TokensError(
            f"positions: expected signed whole numbers of shape {token_ids_BT.shape}, from -1 (padding); "
            f"found {positions_BT.dtype} {positions_BT.shape} from {positions_BT.min(initial=0)}"
        )
    if token_ids_BT.min() < 0 or token_ids_BT.max() >= vocab_size:
        wrong = token_ids_BT[(token_ids_BT < 0) | (token_ids_BT >= vocab_size)][0]
        raise TokensError(
            f"token ids: expected 0 to {vocab_size - 1}, found {wrong}; was it made by another model's tokenizer?"
        )
