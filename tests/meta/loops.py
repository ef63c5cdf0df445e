"""Loops as users write them, with a mistake or without one, around ONNX Runtime and a right export."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnxruntime

from verify.trace_file import Trace


@dataclass(frozen=True)
class Loop:
    """A greedy loop that decodes one prompt after the other, with the cache.

    Attributes:
        mask: what a step with a past says is there: all tokens, or the new one alone, whose 1 comes behind the zeros
            or in front of them.
        positions: of new tokens: they go on from the past, begin at 0 each time, or stay at the first one's.
        resets: each prompt begins with an empty cache.
        bos: this token is put in front of every prompt; -1: the first token is left out; None: as it should be.
        penalty: of tokens that were there already, before one is chosen.
        ends: tokens after which it stops.
    """

    mask: Literal["all", "new, behind", "new, in front"] = "all"
    positions: Literal["on", "0", "held"] = "on"
    resets: bool = True
    bos: int | None = None
    penalty: float = 1.0
    ends: tuple[int, ...] = ()

    def trace(self, session: onnxruntime.InferenceSession, prompts: Sequence[Sequence[int]], new: int) -> Trace:
        """What it decodes, recorded as if it had been fed the prompts as they are, with the logits it chose by."""
        tokens, logits = [], []
        past = _empty(session)
        for prompt in prompts:
            past = _empty(session) if self.resets else past
            chosen, logits_TV, past = self._row(session, self._fed(prompt), new, past)
            tokens.append(chosen)
            logits.append(logits_TV)
        return Trace([list(prompt) for prompt in prompts], tokens, logits)

    def _fed(self, prompt: Sequence[int]) -> list[int]:
        if self.bos is None:
            return list(prompt)
        return list(prompt[1:]) if self.bos < 0 else [self.bos, *prompt]

    def _row(
        self, session: onnxruntime.InferenceSession, prompt: list[int], new: int, past: dict[str, np.ndarray]
    ) -> tuple[list[int], np.ndarray, dict[str, np.ndarray]]:
        names = [output.name for output in session.get_outputs()]
        seen, fed, rows = list(prompt), list(prompt), []
        chosen: list[int] = []
        while len(chosen) < new and not (chosen and chosen[-1] in self.ends):
            held = next(iter(past.values())).shape[2]
            mask_1S = np.ones((1, held + len(fed)), np.int64)
            if chosen and self.mask == "new, behind":
                mask_1S[:, :-1] = 0
            if chosen and self.mask == "new, in front":
                mask_1S[:, 1:] = 0
            first = 0 if not chosen or self.positions == "0" else len(prompt)
            first += len(chosen) - 1 if chosen and self.positions == "on" else 0
            feeds = {"input_ids": [fed], "attention_mask": mask_1S, "position_ids": [range(first, first + len(fed))]}
            given = dict(
                zip(names, session.run(None, {n: np.asarray(x) for n, x in feeds.items()} | past), strict=True)
            )
            past = {name: given[name.replace("past_key_values", "present")] for name in past}
            logits_V = given["logits"][0, -1]
            there = logits_V[seen_ids := np.unique(seen)]
            logits_V[seen_ids] = np.where(there > 0, there / self.penalty, there * self.penalty)
            rows.append(logits_V)
            chosen.append(int(logits_V.argmax()))
            fed = chosen[-1:]
            seen += fed
        return chosen, np.stack(rows), past


def _empty(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    pasts = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
    return {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for each in pasts}
