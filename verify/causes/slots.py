"""What can become of a cache: of what is handed on from pass to pass, and of what attention sees of it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from refengine.ops import Ops
from verify.causes import Evidence
from verify.causes.seeing import with_mask
from verify.naming.counterfactual import Counterfactual, LayerPast, Layers, Pasts


def first_time(cache: Callable[[Pasts, int], Pasts]) -> Callable[[Pasts, int], Pasts]:
    """The mistake after the prompts, and none later."""
    return lambda pasts, step: cache(pasts, step) if step == 1 else pasts


def each_time(cache: Callable[[Pasts], Pasts]) -> Callable[[Pasts, int], Pasts]:
    """The mistake after every pass."""
    return lambda pasts, step: cache(pasts)


def pairs_of_layers(evidence: Evidence) -> Iterator[tuple[int, int]]:
    """Layers that may have been taken for each other: two that are suspected together, then neighbours."""
    suspected = [tuple(sorted(layers)) for layers in evidence.suspects if layers is not None]
    pairs = [(layers[0], layers[1]) for layers in suspected if len(layers) == 2]
    alone = [layers[0] for layers in suspected if len(layers) == 1]
    for layer in alone:
        pairs += [(layer - 1, layer), (layer, layer + 1)]
    last = evidence.config.num_hidden_layers - 1
    return (pair for pair in dict.fromkeys(pairs) if pair[0] >= 0 and pair[1] <= last)


def of_other_layers(
    evidence: Evidence,
) -> Iterator[tuple[Mapping[str, object], frozenset[int], Callable[[Pasts], Pasts]]]:
    """Layers that find what others have left, as values tell it; two each other's; a suspected one its neighbour's.

    Yields: parameters as a report prints them, the layers, and what is found.
    """
    sources: dict[str, dict[int, int]] = {"k_cache": {}, "v_cache": {}}
    for kind, layer, source in evidence.constants.get("cache_sources", ()):
        sources[kind][layer] = source
    keys, values = sources.values()
    if found := frozenset([*keys, *values]):
        yield {"order": ", ".join(_found_by(sorted(found), keys, values))}, found, partial(from_sources, keys, values)
    for one, other in pairs_of_layers(evidence):
        both = {one: other, other: one}
        yield {"order": f"layers {one} and {other} exchanged"}, frozenset(both), partial(from_sources, both, both)
    for layer in (min(layers) for layers in evidence.suspects if layers is not None and len(layers) == 1):
        for other in (layer - 1, layer + 1):
            if 0 <= other < evidence.config.num_hidden_layers:
                beside = {layer: other}
                said = ", ".join(_found_by([layer], beside, beside))
                yield {"order": said}, frozenset(beside), partial(from_sources, beside, beside)


def _found_by(layers: Sequence[int], keys: Mapping[int, int], values: Mapping[int, int]) -> Iterator[str]:
    """Whose keys and values layers find, in words."""
    for layer in layers:
        if keys.get(layer) == values.get(layer):
            yield f"layer {layer} finds what layer {keys[layer]} left"
        else:
            kinds = (("keys", keys), ("values", values))
            yield from (f"layer {layer} finds the {kind} of layer {of[layer]}" for kind, of in kinds if layer in of)


def handed(
    cause: str,
    parameters: Mapping[str, object],
    layers: Layers,
    cache: Callable[[Pasts, int], Pasts],
    *,
    mixes_layers: bool = False,
) -> Counterfactual:
    """A mistake in what one pass hands to the next."""
    return Counterfactual(cause, parameters, layers, cache=cache, mixes_layers=mixes_layers, is_causal=False)


def in_narrow_floats(dtype: type, of: str, pasts: Pasts) -> Pasts:
    """Keys and values rounded to a narrower float, or one of the two: `of` is "keys", "values" or "both"."""

    def rounded(x_BKSH: np.ndarray, kind: str) -> np.ndarray:
        return x_BKSH.astype(dtype).astype(x_BKSH.dtype) if of in (kind, "both") else x_BKSH

    return [replace(past, k_BKSH=rounded(past.k_BKSH, "keys"), v_BKSH=rounded(past.v_BKSH, "values")) for past in pasts]


def swapped(pasts: Pasts, step: int) -> Pasts:
    """Keys and values exchanged."""
    return [replace(past, k_BKSH=past.v_BKSH, v_BKSH=past.k_BKSH) for past in pasts]


def from_layers(order_L: Sequence[int], pasts: Pasts) -> Pasts:
    """Each layer finds what this one has left."""
    return [pasts[layer] for layer in order_L]


def from_sources(keys: Mapping[int, int], values: Mapping[int, int], pasts: Pasts) -> Pasts:
    """These layers find the keys, and these the values, that another one has left."""
    return [
        replace(past, k_BKSH=pasts[keys.get(layer, layer)].k_BKSH, v_BKSH=pasts[values.get(layer, layer)].v_BKSH)
        for layer, past in enumerate(pasts)
    ]


def keys_first_read_as_pairs(pasts: Pasts) -> Pasts:
    """A list of all keys, then all values, read as keys and values of one layer after the other."""
    if not _are_alike(pasts):
        return pasts
    listed = [past.k_BKSH for past in pasts] + [past.v_BKSH for past in pasts]
    return [
        replace(past, k_BKSH=k_BKSH, v_BKSH=v_BKSH)
        for past, k_BKSH, v_BKSH in zip(pasts, listed[::2], listed[1::2], strict=True)
    ]


def pairs_read_as_keys_first(pasts: Pasts) -> Pasts:
    """A list of keys and values of one layer after the other, read as all keys, then all values."""
    if not _are_alike(pasts):
        return pasts
    listed = [x_BKSH for past in pasts for x_BKSH in (past.k_BKSH, past.v_BKSH)]
    keys, values = listed[: len(pasts)], listed[len(pasts) :]
    return [
        replace(past, k_BKSH=k_BKSH, v_BKSH=v_BKSH) for past, k_BKSH, v_BKSH in zip(pasts, keys, values, strict=True)
    ]


def _are_alike(pasts: Pasts) -> bool:
    """Whether any array may be taken for any other; not where another mistake has made those of a layer shorter."""
    return len({x_BKSH.shape for past in pasts for x_BKSH in (past.k_BKSH, past.v_BKSH)}) == 1


def seeing(seen: Callable[[np.ndarray, int], np.ndarray], right: Ops) -> Ops:
    """Attention that sees other slots: `seen` makes their positions of all positions and the number of new tokens."""
    return with_mask(
        lambda positions_BT, positions_BS, window: (positions_BT, seen(positions_BS, positions_BT.shape[1]), window),
        right,
    )


def newest_alone(positions_BS: np.ndarray, new: int) -> np.ndarray:
    """Nothing of the past is seen."""
    return without(positions_BS, slice(0, positions_BS.shape[1] - new))


def without(positions_BS: np.ndarray, slots: slice) -> np.ndarray:
    """As if these slots were padding."""
    positions_BS = positions_BS.copy()
    positions_BS[:, slots] = -1
    return positions_BS


def kept(past: LayerPast, slots: slice) -> LayerPast:
    """These slots alone."""
    return LayerPast(past.k_BKSH[:, :, slots], past.v_BKSH[:, :, slots], past.positions_BS[:, slots])


def seeing_zeros(empty: Callable[[int], int], right: Ops) -> Ops:
    """Attention to empty slots too, whose keys and values are zero: so many, where so many hold something.

    They stand for one slot, which weighs as much as all of them: in a dimension of its own, where queries have 1.
    """

    def attend(
        q_BTNH: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        positions_BT: np.ndarray,
        positions_BS: np.ndarray,
        window: int | None,
    ) -> np.ndarray:
        slots, head_dim = empty(positions_BS.shape[1]), q_BTNH.shape[-1]
        if slots < 1:
            return right.attend(q_BTNH, k, v, positions_BT, positions_BS, window)
        # Scores are divided by the root of the last axis, which is longer by one.
        longer = q_BTNH.dtype.type(((head_dim + 1) / head_dim) ** 0.5)
        q_BTNH = np.concatenate([q_BTNH * longer, np.ones_like(q_BTNH[..., :1])], axis=-1)
        k_BKSH, v_BKSH = (np.pad(np.asarray(x), ((0, 0), (0, 0), (0, 1), (0, 1))) for x in (k, v))
        k_BKSH[:, :, -1, -1] = math.log(slots) * (head_dim + 1) ** 0.5
        # A token at position 0 is seen by all.
        positions_BS = np.pad(positions_BS, ((0, 0), (0, 1)))
        return right.attend(q_BTNH, k_BKSH, v_BKSH, positions_BT, positions_BS, window)[..., :head_dim]

    return replace(right, attend=attend)


def caching_unrotated(heads: int, only_new: bool, right: Ops) -> Ops:
    """Keys go to the cache as they are; attention rotates the newest of them, or all by the newest position.

    Args:
        heads: of the queries, which come first where both are rotated.
    """
    table: list[np.ndarray] = []  # of this layer's pass: the operators are made anew for each

    def rotate(x_BTMH: np.ndarray, cos_BTP: np.ndarray, sin_BTP: np.ndarray) -> np.ndarray:
        table[:] = cos_BTP, sin_BTP
        return np.concatenate([right.rotate(x_BTMH[:, :, :heads], cos_BTP, sin_BTP), x_BTMH[:, :, heads:]], axis=2)

    def attend(q_BTNH: np.ndarray, k: np.ndarray, *others: object) -> np.ndarray:
        if not table:  # another mistake rotates nothing
            return right.attend(q_BTNH, k, *others)
        size = 2 * table[0].shape[-1]
        k_BSKH = np.array(k).swapaxes(1, 2)
        # Another mistake may have given keys more dimensions, and for each a slot of zeros behind the others.
        end = k_BSKH.shape[1] - (k_BSKH.shape[-1] - size)
        past, newest = np.split(k_BSKH[:, :end, :, :size], [end - q_BTNH.shape[1]], axis=1)
        newest[:] = right.rotate(newest, *table)
        if past.shape[1] and not only_new:
            past[:] = right.rotate(past, *(x_BTP[:, -1:] for x_BTP in table))
        return right.attend(q_BTNH, k_BSKH.swapaxes(1, 2), *others)

    return replace(right, rotate=rotate, attend=attend)
