"""Mistakes in the key-value cache: what a pass hands on to the next one, and what that reads of it."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from refengine.config import Config
from refengine.errors import InputError
from refengine.quant import SCHEMES, ops_for
from refengine.scheme import Scheme, check_scheme
from verify.causes import Cause, Evidence, Family
from verify.causes.rotating import SHORT_DTYPES
from verify.causes.slots import (
    caching_unrotated,
    each_time,
    first_time,
    from_layers,
    handed,
    in_narrow_floats,
    kept,
    keys_first_read_as_pairs,
    newest_alone,
    of_other_layers,
    pairs_read_as_keys_first,
    seeing,
    seeing_zeros,
    swapped,
    without,
)
from verify.naming.counterfactual import Counterfactual, Fed, Layers, Pasts

USUAL_LOSSES = (1, 2, 3, 4)  # tokens
EXACT_SCHEMES = ("float32", "float64")


def cache_past_ignored(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """A step after the prompt sees its own tokens only, and nothing of the past.

    Seen: the first new token is right, all others are those of a model without a context; without the cache all is
        right.
    Why: the past is an input that the graph does not use, or a runtime that was given none, or a mask that hides it.
    Test: the reference with a cache of which attention sees the newest tokens alone, in all layers or in one.
    Fix: connect past_key_values of each layer with its present, and feed attention_mask for past and new tokens.
    Source: onnxruntime-genai issue 1604.
    """
    if not evidence.use_cache:
        return
    for layers in evidence.suspects:
        yield Counterfactual("cache-past-ignored", {}, layers, ops=partial(seeing, newest_alone), is_causal=False)


def cache_key_value_swapped(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Keys are handed to the next step as values, and values as keys.

    Seen: the first new token is right, the second is not; `present` of the prompt holds the other of the two.
    Why: outputs and inputs of the cache were matched by position, and one of them lists values first.
    Test: the reference with the two exchanged after every pass, or once after the prompts, in all layers or in one.
    Fix: match past_key_values and present by name.
    Source: PyTorch issue 143576.
    """
    if not evidence.use_cache:
        return
    for layers in evidence.suspects:
        yield handed("cache-key-value-swapped", {"when": "after every pass"}, layers, swapped)
        yield handed("cache-key-value-swapped", {"when": "after the prompts"}, layers, first_time(swapped))


def cache_layer_order(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """A layer finds the keys and values of another one in its cache.

    Seen: the first new token is right, the second is not; each `present` of the prompt is one of the checkpoint's, but
        another layer's.
    Why: names were sorted as text, so that present.10 comes before present.2; or a list with all keys first was read as
        one in which each layer's keys and values are neighbours, or the other way round.
    Test: the reference with the layers of its cache in that order after every pass; or with that layer's which the
        keys and values that are given for the prompts are, or a neighbour's.
    Fix: match past_key_values and present by name, or sort them by the number of the layer.
    Source: nntrainer issue 4233.
    """
    if not evidence.use_cache:
        return
    layers = evidence.config.num_hidden_layers
    text = np.array(sorted(range(layers), key=str))
    orders: dict[str, Callable[[Pasts], Pasts]] = {}
    if layers > 10:
        orders["outputs sorted as text"] = partial(from_layers, np.argsort(text).tolist())
        orders["inputs sorted as text"] = partial(from_layers, text.tolist())
    if layers > 1:
        orders["keys first, read as pairs"] = keys_first_read_as_pairs
        orders["pairs, read as keys first"] = pairs_read_as_keys_first
        orders["last layer first"] = partial(from_layers, list(range(layers))[::-1])
    for order, ordered in orders.items():
        yield handed("cache-layer-order", {"order": order}, None, each_time(ordered), mixes_layers=True)
    for said, mistaken, found in of_other_layers(evidence):
        yield handed("cache-layer-order", said, mistaken, each_time(found), mixes_layers=True)


def cache_before_rope(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Keys are cached before their rotation.

    Seen: the first new token is right; keys of `present` are wrong from the second position on, values are right.
    Why: `present` was taken from the key projection, and the past is joined behind the rotation, or before one that
        knows the positions of the new tokens alone.
    Test: the reference with keys of the past that are never rotated, or all by the newest token's position; in all
        layers or in one.
    Fix: cache keys after rotation, or rotate past and new keys by their own positions.
    Source: the two orders of `cache.update` and `apply_rotary_pos_emb` in transformers' models.
    """
    if not evidence.use_cache:
        return
    heads = evidence.config.num_attention_heads
    for layers in evidence.suspects:
        for past in ("never rotated", "rotated by the newest position"):
            ops = partial(caching_unrotated, heads, past == "never rotated")
            yield Counterfactual("cache-before-rope", {"past": past}, layers, ops=ops, is_causal=False)


def cache_truncated(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """A step sees a past that lacks its newest or its oldest tokens.

    Seen: the first new token is right; later ones go wrong, slowly where the oldest tokens are lost.
    Why: a length that is one too small, a token that is written after it was to be read, a buffer that is full and
        shifts.
    Test: the reference without so many of the newest or of the oldest tokens of its past, or with room for so many
        alone; in all layers or in one.
    Fix: hand on all of past and new keys and values; count the tokens of the past where its length is asked for.
    Source: the lengths that GroupQueryAttention takes: seqlens_k is one less than the tokens of past and new.
    """
    if not evidence.use_cache or evidence.longest < 2:
        return
    for layers in evidence.suspects:
        for tokens in USUAL_LOSSES:
            yield _hidden("newest", layers, tokens)
            yield _hidden("oldest", layers, tokens)
        for tokens in USUAL_LOSSES:
            yield _lost("newest", layers, tokens)
            yield _lost("oldest", layers, tokens)
            yield _lost("newest of the prompt", layers, tokens)
        for capacity in dict.fromkeys(evidence.constants.get("past_sequence_length", ())):
            yield _room(layers, capacity)
    for likeliest in evidence.suspects[:1]:  # a search takes time
        yield Family(partial(_hidden, "oldest", likeliest), 1, evidence.longest)
        yield Family(partial(_room, likeliest), 1, evidence.longest)


def cache_capacity_as_length(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Attention sees the empty slots of a buffer too: keys and values of zero.

    Seen: wrong from the first token on where the prompt has such a buffer, later ones in any case; the shorter the
        sequence, the more.
    Why: the size of the buffer was taken for the number of tokens in it.
    Test: the reference with slots of zeros up to the capacity, or with so many of them at every pass; in all layers or
        in one.
    Fix: hide the slots beyond the sequence: by attention_mask, or by the length that the operator takes.
    Source: hip-ep issue 753.
    """
    if not evidence.use_cache:
        return
    declared = evidence.constants.get("past_sequence_length", ())
    powers = [2**exponent for exponent in range(3, 15)]
    usual = [*powers, evidence.config.max_position_embeddings]
    for layers in evidence.suspects:
        for capacity in dict.fromkeys([*declared, *usual]):
            if capacity > evidence.longest:
                yield _with_capacity(layers, capacity)
    for likeliest in evidence.suspects[:1]:  # a search takes time
        yield Family(partial(_with_capacity, likeliest), evidence.longest + 1, evidence.longest + 4096)
        yield Family(partial(_with_zeros, likeliest), 1, 4096)


def cache_not_reset(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """A prompt sees what is left in the cache of the prompts before it.

    Seen: the first prompt is right, later ones are not; each alone is right.
    Why: a stateful model whose state was not reset, or a cache object that was used again.
    Test: the reference with the cache of all prompts so far, whose positions begin again or go on.
    Fix: reset the state (OpenVINO: `reset_state`), or make a cache for each request.
    Source: openvino.genai issue 1850.
    """
    if not evidence.use_cache or evidence.batches < 2:
        return

    def going_on(fed: Fed) -> Fed:
        there = fed.rope_positions_BT >= 0
        return replace(fed, rope_positions_BT=np.where(there, fed.rope_positions_BT + fed.kept_B1, -1))

    yield Counterfactual("cache-not-reset", {"positions": "begin again"}, keeps_rows=True, is_causal=False)
    yield Counterfactual("cache-not-reset", {"positions": "go on"}, keeps_rows=True, fed=going_on, is_causal=False)


def cache_quantized(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The runtime stores its cache in fewer bits than it computes in.

    Seen: tokens are mostly right, logits are hundreds of times the float32 noise off; without the cache all is right,
        and on OpenVINO so is a single long pass.
    Why: KV_CACHE_PRECISION of OpenVINO is u8 unless it is asked for another, and --cache-type-k of llama.cpp is chosen.
    Test: the reference with that scheme for its cache; its noise then includes the codes that rounding moves. Or with a
        past that is rounded to 16 bits before the next pass reads it, in all layers or in one, keys, values or both.
    Fix: KV_CACHE_PRECISION=f32 where that is not meant; where it is, --expect with the name of the scheme.
    Source: OpenVINO issue 27454; onnxruntime-genai issue 1206.
    """
    if not evidence.use_cache:
        return
    for name, scheme in SCHEMES.items():
        if name not in EXACT_SCHEMES and _can_store(evidence.config, scheme):
            ops = partial(ops_for, scheme)
            yield Counterfactual("cache-quantized", {"scheme": name}, scheme=scheme, ops=ops, is_causal=False)
    for layers in evidence.suspects:
        for (name, dtype), of in itertools.product(SHORT_DTYPES.items(), ("both", "keys", "values")):
            narrow = each_time(partial(in_narrow_floats, dtype, of))
            parameters = {"past": name} if of == "both" else {"past": name, "of": of}
            yield replace(handed("cache-quantized", parameters, layers, narrow), codes_past=True)


def _hidden(which: str, layers: Layers, tokens: float) -> Counterfactual:
    """Slots that no pass after the first sees; those that are the newest now come into sight later."""
    count = round(tokens)

    def seen(positions_BS: np.ndarray, new: int) -> np.ndarray:
        past = positions_BS.shape[1] - new
        return without(
            positions_BS, slice(max(0, past - count), past) if which == "newest" else slice(0, min(count, past))
        )

    return Counterfactual(
        "cache-truncated",
        {"hidden": which, "tokens": count},
        layers,
        ops=partial(seeing, seen),
        is_causal=False,
        is_of_batches=which == "oldest",  # of a short row, the oldest slots are padding
    )


def _lost(which: str, layers: Layers, tokens: float) -> Counterfactual:
    """Slots that are not handed on, after each pass or after that of the prompts."""
    count = round(tokens)

    def cut(pasts: Pasts, step: int) -> Pasts:
        if which == "oldest":
            return [kept(past, slice(count, None)) for past in pasts]
        return [kept(past, slice(0, max(0, past.positions_BS.shape[1] - count))) for past in pasts]

    cache = first_time(cut) if which == "newest of the prompt" else cut
    made = handed("cache-truncated", {"lost": which, "tokens": count}, layers, cache)
    return replace(made, is_of_batches=which == "oldest")  # of a short row, the oldest slots are padding


def _room(layers: Layers, capacity: float) -> Counterfactual:
    """A past that holds so many slots: the oldest make room for the newest."""
    count = round(capacity)

    def cut(pasts: Pasts, step: int) -> Pasts:
        return [kept(past, slice(max(0, past.positions_BS.shape[1] - count), None)) for past in pasts]

    return replace(handed("cache-truncated", {"lost": "oldest", "capacity": count}, layers, cut), is_of_batches=True)


def _with_capacity(layers: Layers, capacity: float) -> Counterfactual:
    slots = round(capacity)
    ops = partial(seeing_zeros, lambda held: slots - held)
    return Counterfactual(
        "cache-capacity-as-length", {"capacity": slots}, layers, ops=ops, is_causal=False, is_of_batches=True
    )


def _with_zeros(layers: Layers, empty: float) -> Counterfactual:
    slots = round(empty)
    ops = partial(seeing_zeros, lambda held: slots)
    return Counterfactual("cache-capacity-as-length", {"empty slots": slots}, layers, ops=ops, is_causal=False)


def _can_store(config: Config, scheme: Scheme) -> bool:
    try:
        check_scheme(config, scheme)
    except InputError:
        return False
    return True


CAUSES: tuple[Cause, ...] = (
    cache_past_ignored,
    cache_key_value_swapped,
    cache_layer_order,
    cache_before_rope,
    cache_truncated,
    cache_capacity_as_length,
    cache_not_reset,
    cache_quantized,
)
