"""One layer of a candidate by itself: counterfactuals held against what it made of its own input."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice

import numpy as np

from refengine.config import Config
from refengine.model import attention, mlp
from refengine.ops import OPS, Ops
from refengine.scheme import Scheme
from refengine.trace import no_trace
from refengine.weights import Layer, Weights
from verify.locating.flow import Flow
from verify.locating.introduced import CLEARLY, Part
from verify.locating.sample import Sample, Streams
from verify.naming.counterfactual import (
    Counterfactual,
    Fed,
    Mistakes,
    layer_as_if,
    on_top_of,
    same_logits,
    unchanged,
)
from verify.naming.handed_cache import HandedCache, cache_with
from verify.naming.screen import EXPLAINED, PROMISING, Tried, promising, share_at_rest
from verify.truth.noise import rms

HALVES = ("self_attn.residual", "mlp.residual")


@dataclass(frozen=True)
class Given:
    """What a candidate had in front of one layer, between its halves and behind it, and what is honest of both.

    Attributes:
        layer: its number.
        sample: the rows that were traced.
        streams: the residual stream, `BTD`, at the three places.
        parts: the halves, as they were held against their own input.
    """

    layer: int
    sample: Sample
    streams: tuple[np.ndarray, np.ndarray, np.ndarray]
    parts: tuple[Part, Part]

    @property
    def wrong(self) -> tuple[Part, ...]:
        """The halves that are clearly wrong by themselves."""
        return tuple(part for part in self.parts if part.excess > CLEARLY)


def given_layers(flow: Flow, streams: Streams, parts: Sequence[Part]) -> Iterator[Given]:
    """Those of which a half is clearly wrong, as far as all that is needed was shown."""
    names = [flow.embedding, *flow.sums]
    for layer in range(len(flow.sums) // 2):
        shown = [name and streams.whole(name) for name in names[2 * layer : 2 * layer + 3]]
        halves = [part for half in HALVES for part in parts if (part.layer, part.point) == (layer, half)]
        before, middle, after = (None if isinstance(each, str) else each for each in shown)
        if before is None or middle is None or after is None or len(halves) < len(HALVES):
            continue
        given = Given(layer, streams.sample, (before, middle, after), (halves[0], halves[1]))
        if given.wrong:
            yield given


def is_of_layers(mistake: Counterfactual) -> bool:
    """Whether a layer shows it from its own input: not what another layer or batch hands over."""
    of_runs = mistake.prompt is not unchanged or mistake.logits is not same_logits or mistake.keeps_rows
    return not of_runs and not mistake.mixes_layers


class LayerScreen:
    """A layer whose output is not what its input should make, by half.

    Args:
        weights: in the dtype in which counterfactuals are run.
        given: what the candidate had.
        scheme: how its cache is expected to store vectors; None: as they are.
    """

    def __init__(self, weights: Weights, given: Given, scheme: Scheme | None = None):
        sample = given.sample
        self.given = given
        self._weights, self._scheme = weights, scheme
        self._config = replace(weights.config, num_hidden_layers=1)
        self._right = _layer(weights, given.layer)
        self._streams = [np.nan_to_num(stream.astype(weights.dtype)) for stream in given.streams]
        self._there_BT = sample.positions_BT >= 0
        self._before = {part.point: self._errors((), part) for part in given.parts}
        self.nothing = Tried((), self._together(self._before, given.wrong))

    def tried(self, *mistakes: Counterfactual) -> Tried:
        """What mistakes leave of the halves that are wrong; promising only if the right half stays so."""
        wrong = self.given.wrong
        left = {part.point: self._errors(mistakes, part) for part in wrong}
        is_promising = all(self._is_explained(part, left[part.point]) for part in wrong) and all(
            _ratio(self._errors(mistakes, part), part) <= PROMISING * part.noise.overall_bound
            for part in self.given.parts
            if part not in wrong
        )
        shares = []
        for part in wrong:
            known_P = ~np.isnan(left[part.point])
            before_P, left_P = (
                each[known_P] / part.noise.rms_P[known_P] for each in (self._before[part.point], left[part.point])
            )
            shares.append(share_at_rest(before_P, left_P, part.noise.position_bound))
        return Tried(mistakes, self._together(left, wrong), is_promising, sum(shares) / len(shares))

    def is_right_in_prompts(self, mistakes: Mistakes) -> bool:
        """Whether mistakes leave nothing but what later passes bring; of none, whether that is all that is wrong."""
        sample = self.given.sample
        is_prompt_BT = np.zeros(self._there_BT.shape, bool)
        is_prompt_BT[:, sample.columns(0)] = True
        prompt_P = is_prompt_BT[self._there_BT]
        return all(
            (
                self._errors(mistakes, part)[prompt_P]
                <= PROMISING * part.noise.position_bound * part.noise.rms_P[prompt_P]
            ).all()
            for part in self.given.wrong
        )

    def _is_explained(self, part: Part, left_P: np.ndarray) -> bool:
        before = _ratio(self._before[part.point], part)
        return _ratio(left_P, part) <= promising(part.noise.overall_bound, before, EXPLAINED)

    def _together(self, left: Mapping[str, np.ndarray], parts: Sequence[Part]) -> float:
        return float(rms(np.array([_ratio(left[part.point], part) for part in parts])))

    def _errors(self, mistakes: Mistakes, part: Part) -> np.ndarray:
        """At each position of each row; NaN where that cannot be told from what was given."""
        first, given = (0, 1) if part.point == HALVES[0] else (1, 2)
        right_BTD = self._attended(mistakes) if first == 0 else self._after_mlp(mistakes)
        width = right_BTD.shape[1]
        error_BT = np.full(self._there_BT.shape, np.nan)
        made_BT = rms(self._streams[given][:, :width] - right_BTD, axis=-1)
        error_BT[:, :width] = np.where(np.isnan(made_BT), np.inf, made_BT)
        error_P: np.ndarray = error_BT[self._there_BT]
        return error_P

    def _as_if(self, mistakes: Mistakes) -> tuple[Config, Layer, Ops]:
        """Operators are made anew: some count how often they are asked in a layer."""
        weights = reduce(lambda right, mistake: mistake.weights(right), mistakes, self._weights)
        layer = self._right if weights is self._weights else _layer(weights, self.given.layer)
        ops = reduce(lambda right, mistake: mistake.all_ops(right), mistakes, OPS)
        there = [mistake for mistake in mistakes if mistake.is_in(self.given.layer)]
        return layer_as_if(self._config, layer, ops, there)

    def _attended(self, mistakes: Mistakes) -> np.ndarray:
        """The stream behind attention, pass after pass; only of the first one where later ones began with others."""
        sample, pieces, mistakes = self.given.sample, [], on_top_of(self._scheme, mistakes)
        cache = cache_with(mistakes, self._config, len(self._there_BT), self._weights.dtype)
        for step, columns in enumerate(self._columns(mistakes)):
            if step and isinstance(cache, HandedCache):
                cache.hand_over(step, [replace(each, layers=None) for each in mistakes])
            config, layer, ops = self._as_if(mistakes)
            positions_BT = sample.positions_BT[:, columns]
            fed = Fed(sample.token_ids_BT[:, columns], positions_BT, positions_BT, step)
            fed = reduce(lambda right, mistake: mistake.fed(right), mistakes, fed)
            rope = ops.rope_table(
                config.rope_parameters,
                config.head_dim,
                config.max_position_embeddings,
                fed.rope_positions_BT,
                self._weights.dtype,
            )
            x_BTD = self._streams[0][:, columns]
            h_BTD = ops.rms_norm(x_BTD, layer.input_layernorm_D, config.rms_norm_eps)
            pieces.append(x_BTD + attention(config, layer, 0, h_BTD, fed.positions_BT, rope, cache, ops, no_trace))
        return np.concatenate(pieces, axis=1)

    def _columns(self, mistakes: Mistakes) -> list[slice]:
        sample = self.given.sample
        if all(mistake.is_causal for mistake in mistakes):
            return [slice(None)]
        steps = len(sample.tokens[0]) if sample.use_cache else 1
        return [sample.columns(step) for step in range(steps)]

    def _after_mlp(self, mistakes: Mistakes) -> np.ndarray:
        config, layer, ops = self._as_if(mistakes)
        x_BTD = self._streams[1]
        ops.rms_norm(x_BTD[:, :1], layer.input_layernorm_D, config.rms_norm_eps)  # a layer's first norm comes first
        h_BTD = ops.rms_norm(x_BTD, layer.post_attention_layernorm_D, config.rms_norm_eps)
        after_BTD: np.ndarray = x_BTD + mlp(config, layer, "", h_BTD, ops, no_trace)
        return after_BTD


def _layer(weights: Weights, number: int) -> Layer:
    return next(islice(weights.layers(), number, None))


def _ratio(error_P: np.ndarray, part: Part) -> float:
    """Over the positions that are known."""
    known_P = ~np.isnan(error_P)
    if not known_P.any():
        return math.inf
    return float(rms(error_P[known_P]) / rms(part.noise.rms_P[known_P]))
