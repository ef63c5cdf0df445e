"""Mistakes in attention: which heads meet, how scores are scaled, and which tokens are seen."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from refengine.ops import Ops, attend, scores
from verify.causes import Cause, Evidence, Family
from verify.causes.constants import is_close, misread, shortest
from verify.causes.seeing import (
    all_alike,
    counted_from_first_slot,
    everything,
    heads_reordered,
    heads_scrambled,
    padding_rotated_for,
    padding_too,
    with_mask,
)
from verify.naming.counterfactual import Counterfactual, Layers, unchanged

USUAL_SOFTCAPS = (50.0, 30.0, 20.0)
USUAL_WINDOWS = (4096, 2048, 1024, 512, 128)


def kv_heads_tiled(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Key-value heads are tiled, k0 k1 k0 k1, where each is to be repeated in place, k0 k0 k1 k1.

    Seen: wrong from the first token on; keys and values of the first layer are right.
    Why: Tile, or Expand on the axis before the heads, for repeat_interleave; ONNX's own reference did so.
    Test: the reference in which query head n reads key-value head n % num_key_value_heads.
    Fix: Unsqueeze and Expand behind the axis of the heads (axis 2), then Reshape; or an operator that knows groups.
    Source: onnx #7274; onnxscript #2408.
    """
    config = evidence.config
    K, N = config.num_key_value_heads, config.num_attention_heads
    order_N = np.arange(N).reshape(-1, K).T.ravel()  # the query heads that read key-value head 0, then 1, ...

    def ops(right: Ops) -> Ops:
        def attend(q_BTNH: np.ndarray, *others: np.ndarray) -> np.ndarray:
            y_BTNH = np.empty_like(q_BTNH)
            y_BTNH[:, :, order_N] = right.attend(q_BTNH[:, :, order_N], *others)
            return y_BTNH

        return replace(right, attend=attend)

    for layers in evidence.suspects if 1 < K < N else ():
        yield Counterfactual("kv-heads-tiled", layers=layers, ops=ops)


def head_order(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """o_proj is given the heads in another order than the one that it was trained with.

    Seen: wrong from the first token on; keys and values of the first layer are right.
    Why: heads were grouped by their key-value head and not put back, or a transposition is missing before o_proj.
    Test: the reference with heads in the order of their place in the group, reversed, rolled by one, with head_dim in
        front of the heads, laid out before the tokens, or in the order that the traced heads have.
    Fix: transpose to (batch, tokens, heads, head_dim) before the reshape; head n stays at n.
    Source: nntile #347.
    """
    for layers in evidence.suspects:
        for name, order_NH in _orders(evidence).items():
            yield Counterfactual("head-order", {"order": name}, layers, ops=partial(heads_reordered, order_NH))
        yield Counterfactual(
            *("head-order", {"order": "heads before tokens"}, layers),
            ops=heads_scrambled,
            all_ops=all_alike,
            is_causal=False,
            is_of_batches=True,
        )


def _orders(evidence: Evidence) -> dict[str, np.ndarray]:
    """Which number of a token's heads, laid side by side, comes first, second, ...; the right order is left out."""
    config = evidence.config
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    numbers_NH = np.arange(N * H).reshape(N, H)
    orders = {
        "by place in group": numbers_NH.reshape(K, -1, H).swapaxes(0, 1),
        "by group of places": numbers_NH.reshape(-1, K, H).swapaxes(0, 1),
        "last first": numbers_NH[::-1],
        "one further": np.roll(numbers_NH, 1, axis=0),
        "one back": np.roll(numbers_NH, -1, axis=0),
        "head_dim before heads": numbers_NH.T,
    }
    for order_N in evidence.constants.get("head_order", ()):
        orders[", ".join(map(str, order_N))] = numbers_NH[list(order_N)]
    distinct = {order.tobytes(): (name, order.reshape(-1)) for name, order in reversed(orders.items())}
    distinct.pop(numbers_NH.tobytes(), None)
    return dict(reversed(distinct.values()))


def attention_scale(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Scores are multiplied by another number than 1 / sqrt(head_dim).

    Seen: position 0 is right, every later one wrong; keys and values of the first layer are right.
    Why: the scale was left out, applied twice or on one side only, or made of hidden_size / num_attention_heads where
        head_dim is given.
    Test: the reference with that scale, in all layers or in one; it is read from the graph, or solved for.
    Fix: scale by head_dim ** -0.5 once.
    Source: arXiv 1706.03762, section 3.2.1; ONNX's Attention, whose scale is that by default.
    """
    config = evidence.config
    right_scale = config.head_dim**-0.5
    usual = (
        *(1.0, right_scale**2, right_scale**0.5, right_scale**1.5),
        *(config.hidden_size**-0.5, (config.hidden_size / config.num_attention_heads) ** -0.5),
    )

    def scaled(layers: Layers, scale: float) -> Counterfactual:
        def ops(right: Ops) -> Ops:
            def attend(q_BTNH: np.ndarray, *others: np.ndarray) -> np.ndarray:
                return right.attend(q_BTNH * q_BTNH.dtype.type(scale / right_scale), *others)

            return replace(right, attend=attend)

        return Counterfactual("attention-scale", {"scale": scale}, layers, ops=ops)

    for scale, layers in misread(evidence, "scale", lambda read: is_close(read, right_scale)):
        yield scaled(layers, shortest(scale))
    for layers in evidence.suspects:
        for scale in dict.fromkeys(usual):
            if not is_close(scale, right_scale):
                yield scaled(layers, scale)
        yield Family(partial(scaled, layers), right_scale / 32, right_scale * 32)


def attention_softcap(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Scores are squeezed into a range by tanh, which this family of models does not do.

    Seen: position 0 is right; tokens with large scores are off most.
    Why: softcap of an attention operator was set, from the configuration of another family.
    Test: the reference with cap * tanh(score / cap); the cap is read from the graph, or solved for.
    Fix: leave softcap out, or set it to 0.
    Source: arXiv 2408.00118, section 2, for the cap; onnxruntime's GroupQueryAttention for the attribute.
    """

    def capped(layers: Layers, cap: float) -> Counterfactual:
        def capped_scores(q_BTNH: np.ndarray, k_BKSH: np.ndarray) -> np.ndarray:
            limit = q_BTNH.dtype.type(cap)
            return limit * np.tanh(scores(q_BTNH, k_BKSH) / limit)

        def ops(right: Ops) -> Ops:
            return replace(right, attend=partial(attend, scores=capped_scores))

        return Counterfactual("attention-softcap", {"softcap": cap}, layers, ops=ops)

    for cap, layers in misread(evidence, "softcap", lambda read: not read):
        yield capped(layers, shortest(cap))
    for layers in evidence.suspects:
        for cap in USUAL_SOFTCAPS:
            yield capped(layers, cap)
        yield Family(partial(capped, layers), 0.1, 500.0)


def mask_not_causal(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Tokens of a prompt see those after them.

    Seen: the prompt is wrong from its first token on; keys and values of the first layer are right.
    Why: the mask holds the padding alone, or is_causal was not set.
    Test: the reference in which a token sees all tokens of its pass.
    Fix: add the causal triangle to the mask (GroupQueryAttention has it; Attention needs is_causal=1).
    Source: ONNX's Attention: is_causal is 0 unless it is given.
    """
    for layers in evidence.suspects:
        yield Counterfactual("mask-not-causal", layers=layers, ops=partial(with_mask, everything), is_causal=False)


def mask_causal_alignment(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The causal triangle begins at the first slot although there is a past: new token t sees slots 0 to t.

    Seen: the prompt is right, every step with a past is wrong: its token sees the very first one alone.
    Why: the triangle is aligned at the top left, as if the new tokens were all there are.
    Test: the reference with that alignment. A row whose first slots are padding sees nothing there: its values are
        all alike, or zero, as the runtime has it.
    Fix: align the triangle at the bottom right: key slot <= query slot + length of the past.
    Source: onnxruntime #29020; PyTorch's scaled_dot_product_attention, whose is_causal is top left.
    """
    for layers in evidence.suspects if evidence.use_cache else ():
        for nothing_seen in ("all alike", "zero") if evidence.is_padded else ("zero",):
            yield Counterfactual(
                *("mask-causal-alignment", {"nothing seen": nothing_seen} if evidence.is_padded else {}, layers),
                ops=partial(with_mask, counted_from_first_slot, alike=nothing_seen == "all alike"),
                all_ops=all_alike if nothing_seen == "all alike" else unchanged,
                is_causal=False,
                is_of_batches=evidence.is_padded,
            )


def sliding_window(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Tokens see further back than the window, or less far.

    Seen: everything is right up to the length of the shorter window, and wrong from there on.
    Why: sliding_window was not read, or was read where it is off; or it was counted otherwise: in Hugging Face's models
        age < window, in FlashAttention and operators after it age <= window.
    Test: the reference with that window, or with none; read from the graph, or solved for.
    Fix: write sliding_window of config.json, less 1 where the operator counts the ages up to and including it.
    Source: tract #2323; litgpt #1741; flash-attention's flash_attn_interface.py, window_size.
    """
    right, longest = evidence.config.sliding_window, evidence.longest

    def windowed(layers: Layers, window: float | None) -> Counterfactual:
        whole = None if window is None else round(window)
        return Counterfactual("sliding-window", {"window": whole}, layers, config={"sliding_window": whole})

    def shows(window: int | None) -> bool:
        return window != right and min(window or longest, right or longest) < longest and window != 0

    for read, layers in misread(evidence, "window", lambda read: read == right):
        for window in (read, read + 1, read - 1):
            if shows(window):
                yield windowed(layers, window)
    for layers in evidence.suspects:
        beside = (None, right + 1, right - 1) if right else USUAL_WINDOWS
        yield from (windowed(layers, window) for window in beside if shows(window))
        if longest > 2:
            yield Family(partial(windowed, layers), 1.0, longest - 1.0)


def padding_unmasked(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Tokens attend to the padding in front of their row.

    Seen: right one prompt at a time, and for the longest row of a batch; wrong in the padded ones from the first token.
    Why: attention_mask is an input that the graph does not use, or it is fed ones.
    Test: the reference in which padding is seen like any token, rotated for position 0 or 1.
    Fix: hide the slots whose attention_mask is 0, in the prompt and in every later step.
    Source: optimum #2326.
    """
    for layers in evidence.suspects if evidence.is_padded else ():
        for position in (0, 1):
            yield Counterfactual(
                *("padding-unmasked", {"padding at position": position}, layers),
                ops=partial(with_mask, padding_too),
                all_ops=all_alike,
                fed=partial(padding_rotated_for, position),
                is_causal=layers is None,
                is_of_batches=True,
            )


CAUSES: Sequence[Cause] = (
    kv_heads_tiled,
    head_order,
    attention_scale,
    attention_softcap,
    mask_not_causal,
    mask_causal_alignment,
    sliding_window,
    padding_unmasked,
)
