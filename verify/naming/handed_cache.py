"""A cache as an export's past is: what a pass leaves is handed to the next one, by somebody who may mistake it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refengine.config import Config
from refengine.kvcache import NO_CACHE, Cache, KVCache
from refengine.scheme import stored_as
from verify.naming.counterfactual import LayerPast, Mistakes, Pasts, same_pasts
from verify.truth.codes import Given, GivenCache, can_be_given


class HandedCache:
    """Keys and values of every layer, each layer's with positions of its own, for a batch of rows.

    Args:
        coded: what new vectors are read back from; `NO_CACHE` leaves them as they are.
        pasts: of each layer, what is there already; None: nothing.
        given: what a candidate's cache held of the same rows; None where that is not known.
    """

    def __init__(self, coded: Cache, pasts: Sequence[LayerPast | None], given: Given | None = None):
        self._coded = coded
        self._pasts = list(pasts)
        self._given = given

    @property
    def pasts(self) -> Pasts:
        """Of each layer, what the passes so far have left."""
        return [past for past in self._pasts if past is not None]

    def hand_over(self, step: int, mistakes: Mistakes) -> None:
        """What is there becomes what pass `step` finds, with these mistakes in their layers."""
        if self._given is not None and any(mistake.codes_past for mistake in mistakes):
            self._pasts = [_towards(self._given, layer, past) for layer, past in enumerate(self._pasts)]
        for mistake in mistakes:
            mistaken = mistake.cache(self.pasts, step)
            self._pasts = [
                wrong if mistake.is_in(layer) else right
                for layer, (right, wrong) in enumerate(zip(self._pasts, mistaken, strict=True))
            ]

    def update(
        self, layer: int, k_BKTH: np.ndarray, v_BKTH: np.ndarray, positions_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As of any cache."""
        k_BKSH, v_BKSH, _ = self._coded.update(layer, k_BKTH, v_BKTH, positions_BT)
        new = -positions_BT.shape[1]
        made = LayerPast(np.asarray(k_BKSH[:, :, new:]), np.asarray(v_BKSH[:, :, new:]), positions_BT)
        past = self._pasts[layer]
        if past is not None:
            made = LayerPast(
                np.concatenate([past.k_BKSH, made.k_BKSH], axis=2),
                np.concatenate([past.v_BKSH, made.v_BKSH], axis=2),
                np.concatenate([past.positions_BS, made.positions_BS], axis=1),
            )
        self._pasts[layer] = made
        return made.k_BKSH, made.v_BKSH, made.positions_BS


def cache_with(
    mistakes: Mistakes,
    config: Config,
    rows: int,
    dtype: np.typing.DTypeLike,
    found: Sequence[LayerPast | None] | None = None,
    given: Given | None = None,
) -> Cache:
    """What a first pass finds, with all that these mistakes do to what passes hand to each other.

    Args:
        mistakes: of which one may say how vectors are stored.
        config: of as many layers as there are.
        rows: of a batch.
        dtype: in which vectors come.
        found: of each layer, what is there already; None: nothing.
        given: what a candidate's cache held of the same rows, whose choice is taken where noise may decide between two
            codes; None where that is not known.
    """
    scheme = next((mistake.scheme for mistake in mistakes if mistake.scheme is not None), None)
    right: Cache = KVCache(config, rows, scheme or stored_as(dtype))
    if scheme is not None and given is not None and can_be_given(scheme, given.held):
        right = GivenCache(scheme, given, np.empty((rows, 0), np.int64))
    if found is None and all(mistake.cache is same_pasts for mistake in mistakes):
        return right
    return HandedCache(right if scheme else NO_CACHE, found or [None] * config.num_hidden_layers, given)


def _towards(given: Given, layer: int, past: LayerPast | None) -> LayerPast | None:
    """What a layer's cache holds, moved as far as noise allows towards what a candidate's held."""
    if past is None:
        return None
    k_BKSH, v_BKSH = (
        given.towards(f"layers.{layer}.self_attn.{name}_cache", x_BKSH, past.positions_BS)
        for name, x_BKSH in (("k", past.k_BKSH), ("v", past.v_BKSH))
    )
    return replace(past, k_BKSH=k_BKSH, v_BKSH=v_BKSH)


def seen_by_all(pasts: Pasts) -> Pasts:
    """The same, so that every later token sees it, whatever its position: it stands in front of them all."""
    return [replace(past, positions_BS=np.minimum(past.positions_BS, 0)) for past in pasts]
