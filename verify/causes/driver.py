"""Mistakes of the loop that drives a right model: what it feeds, when it ends, and how it chooses."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from verify.causes import Cause, Evidence, Family
from verify.causes.slots import newest_alone, seeing, without
from verify.naming.counterfactual import Counterfactual

USUAL_PENALTIES = (1.1, 1.05, 1.2, 1.15, 1.3, 1.02, 1.03, 1.5)
LAST_TOKENS = (None, 64)  # that are penalised: all, or the newest, as in llama.cpp


def mask_length(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The loop feeds an attention mask of the new tokens alone, where past and new tokens are meant.

    Seen: the first new token is right, later ones are not.
    Why: `attention_mask = ones((batch, 1))` at every step with a cache. What is missing counts as hidden: behind the
        mask in transformers, so that a step sees the first token only; in front of it elsewhere, so that a step sees
        itself only.
    Test: the reference whose steps see the first slots alone, or the newest.
    Fix: feed a mask that is as long as past and new tokens together: append ones to the one before.
    Source: transformers, masking_utils.py, prepare_padding_mask, which appends zeros to a short mask.
    """
    if evidence.is_our_loop or not evidence.use_cache:
        return

    def first_alone(positions_BS: np.ndarray, new: int) -> np.ndarray:
        is_prompt = positions_BS.shape[1] == new
        return positions_BS if is_prompt else without(positions_BS, slice(new, None))

    for sees, seen in (("the first token", first_alone), ("itself", newest_alone)):
        yield Counterfactual("mask-length", {"a step sees": sees}, ops=partial(seeing, seen), is_causal=False)


def bos_missing(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The prompt is decoded without the token that begins a text, or recorded without it.

    Seen: wrong from the first new token on, less so the longer a prompt is.
    Why: add_special_tokens=False on a text that does not have it, or on a template that leaves it to the tokenizer.
    Test: the reference on the prompt without its first token, or with one more.
    Fix: compare token ids, not texts: the prompt has to begin with bos_token_id once.
    Source: llama-cpp-python issue 1501.
    """
    bos = evidence.config.bos_token_id
    if bos is None or evidence.is_our_loop:
        return
    yield _prompted(
        "bos-missing", {"in": "what was decoded"}, lambda prompt: prompt[1:] if prompt[0] == bos else prompt
    )
    yield _prompted("bos-missing", {"in": "the record"}, lambda prompt: prompt if prompt[0] == bos else [bos, *prompt])


def bos_doubled(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The prompt begins with two of the token that begins a text.

    Seen: wrong from the first new token on, often by little: the answers are only worse.
    Why: a chat template that writes it, and a tokenizer that adds it once more.
    Test: the reference on the prompt with another bos_token_id in front.
    Fix: encode a rendered template with add_special_tokens=False.
    Source: vLLM issue 16976.
    """
    bos = evidence.config.bos_token_id
    if bos is not None and not evidence.is_our_loop:
        yield _prompted("bos-doubled", {"token": bos}, lambda prompt: [bos, *prompt] if prompt[0] == bos else prompt)


def eos_ignored(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Decoding goes on after an end token.

    Seen: every token is right, and there are too many of them: a second answer, or the user's next question.
    Why: eos_token_id of config.json or generation_config.json names several, and one of them is honoured.
    Test: the record itself: a row that goes on after one of the configuration's end tokens.
    Fix: stop at each of them.
    Source: vLLM issue 4180.
    """
    return iter(())


def repetition_penalty(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Tokens that were there already are made less likely before one is chosen.

    Seen: tokens are right until the model wants to repeat one.
    Why: a search option of generation_config.json, of a chat template or of a server that was left on.
    Test: the reference with its logits divided (multiplied where negative) by the penalty at tokens of prompt and
        answer, or of the last 64; the value is solved for.
    Fix: repetition_penalty=1.0 to decode greedily.
    Source: arXiv 1909.05858, section 4.1; transformers' RepetitionPenaltyLogitsProcessor; openvino.genai issue 1152.
    """
    for last in () if evidence.is_our_loop else LAST_TOKENS:
        if last is None or evidence.longest > last:
            make = partial(_penalised, last)
            yield from map(make, USUAL_PENALTIES)
            yield Family(make, 1.001, 3.0)


def _prompted(
    cause: str, parameters: dict[str, object], prompt: Callable[[Sequence[int]], Sequence[int]]
) -> Counterfactual:
    """A prompt of one token keeps it."""
    return Counterfactual(cause, parameters, prompt=lambda right: prompt(right) or right)


def _penalised(last: int | None, penalty: float) -> Counterfactual:
    said: dict[str, object] = {"repetition_penalty": penalty}
    if last is not None:
        said["last"] = last

    def logits(logits_PV: np.ndarray, tokens: Sequence[int], first: int) -> np.ndarray:
        made = logits_PV.copy()
        for position in range(first, len(tokens)):
            seen = np.unique(tokens[max(0, position + 1 - (last or position + 1)) : position + 1])
            there = made[position, seen]
            made[position, seen] = np.where(there > 0, there / penalty, there * penalty)
        return made

    return Counterfactual("repetition-penalty", said, logits=logits)


CAUSES: tuple[Cause, ...] = (mask_length, bos_missing, bos_doubled, eos_ignored, repetition_penalty)
