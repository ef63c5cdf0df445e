"""Drives a candidate: greedy decoding or given tokens, with its cache and without, in left-padded batches."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refengine.tokens import left_padded
from verify.candidates import Candidate, Past
from verify.errors import NoVerdict

Rows = Sequence[Sequence[int]]
OnStep = Callable[[int], None]  # called with the number of tokens just gained, over all rows


@dataclass(frozen=True)
class CandidateRun:
    """What a candidate gave for some prompts.

    Attributes:
        tokens: its own choice at every step of each row; where tokens were forced, what it would have chosen.
        logits: of each row, at its last `len(logits)` positions (an export may give the last position's alone).
        caches: trace point -> of each row, keys or values at every position, heads flattened; empty if it gives none.
        seconds: spent in the candidate.
    """

    tokens: Rows
    logits: Sequence[np.ndarray]
    caches: Mapping[str, Sequence[np.ndarray]]
    seconds: float


def run_candidate(
    candidate: Candidate,
    prompts: Rows,
    max_new_tokens: int,
    *,
    use_cache: bool,
    batch_size: int,
    forced: Rows | None = None,
    on_step: OnStep = lambda tokens: None,
) -> CandidateRun:
    """Decodes `max_new_tokens` for each prompt, going on past end tokens.

    Args:
        use_cache: feed only the new token and the past; otherwise the whole sequence again at every step.
        batch_size: rows decoded together, left-padded.
        forced: tokens to feed whatever the candidate chooses.

    Raises:
        NoVerdict: the runtime failed.
    """
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        parts.append(
            _run_batch(candidate, prompts[rows], max_new_tokens, use_cache, forced[rows] if forced else None, on_step)
        )
    return CandidateRun(
        tokens=[row for part in parts for row in part.tokens],
        logits=[row for part in parts for row in part.logits],
        caches={name: [row for part in parts for row in part.caches[name]] for name in parts[0].caches},
        seconds=sum(part.seconds for part in parts),
    )


def _run_batch(
    candidate: Candidate,
    prompts: Rows,
    max_new_tokens: int,
    use_cache: bool,
    forced: Rows | None,
    on_step: OnStep,
) -> CandidateRun:
    token_ids_BT, positions_BT = left_padded(prompts)
    chosen: list[np.ndarray] = []
    columns: list[np.ndarray] = []  # logits, each (B, some columns, V)
    past: Past | None = None
    seconds = 0.0
    for step in range(max_new_tokens):
        new = slice(-1, None) if use_cache and step else slice(None)
        began = time.perf_counter()
        result = candidate.run(token_ids_BT[:, new], positions_BT[:, new], past if use_cache else None)
        seconds += time.perf_counter() - began
        past = result.past
        # A copy of the last column, since a view would keep the logits of the whole sequence alive at every step.
        columns.append(result.logits_BTV if step == 0 or use_cache else result.logits_BTV[:, -1:].copy())
        chosen.append(result.logits_BTV[:, -1].argmax(axis=-1))
        next_B = chosen[-1] if forced is None else np.array([row[step] for row in forced])
        if step + 1 < max_new_tokens:
            token_ids_BT = np.append(token_ids_BT, next_B[:, None], axis=1)
            positions_BT = np.append(positions_BT, positions_BT[:, -1:] + 1, axis=1)
        on_step(len(prompts))
    logits_BTV = np.concatenate(columns, axis=1)
    there_BT = positions_BT >= 0
    return CandidateRun(
        tokens=np.stack(chosen, axis=1).tolist(),
        logits=[
            logits[-min(int(there.sum()), len(logits)) :] for logits, there in zip(logits_BTV, there_BT, strict=True)
        ],
        caches=_caches(candidate, past, there_BT),
        seconds=seconds,
    )


def _caches(candidate: Candidate, past: Past | None, there_BS: np.ndarray) -> dict[str, list[np.ndarray]]:
    """The final cache by trace point, each row's own positions only."""
    if past is None:
        return {}
    caches = {}
    names = [
        f"layers.{index}.self_attn.{kind}"
        for index in range(len(candidate.interface.layers))
        for kind in ("k_cache", "v_cache")
    ]
    for name, (array, _) in zip(names, candidate.interface.carried, strict=True):
        x_BSKH = past.arrays[array].swapaxes(1, 2)
        if x_BSKH.shape[1] != there_BS.shape[1]:
            raise NoVerdict(
                f"cache: expected {there_BS.shape[1]} tokens after the last step, found {x_BSKH.shape[1]} in {array}"
            )
        caches[name] = [row[there].reshape(int(there.sum()), -1) for row, there in zip(x_BSKH, there_BS, strict=True)]
    return caches
