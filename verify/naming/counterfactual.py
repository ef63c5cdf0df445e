"""The reference as if a mistake were in it: what is other than it should be, as data, and a forward pass with that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import numpy as np

from refengine.config import Config
from refengine.kvcache import Cache
from refengine.model import block
from refengine.ops import OPS, Ops
from refengine.quant import ops_for
from refengine.scheme import Scheme
from refengine.trace import Trace, no_trace
from refengine.weights import Layer, Weights

Layers = frozenset[int] | None  # in which something is; None: in all of them


@dataclass(frozen=True)
class Fed:
    """What one pass is fed.

    Attributes:
        token_ids_BT: as in `forward`.
        positions_BT: what the mask follows from; -1 is padding.
        rope_positions_BT: what the rotation goes by; the same unless somebody mistakes one for the other.
        step: 0 for the prompts, then the number of the new token.
        kept_B1: how many tokens of an earlier batch each row still has before it; 0 unless a mistake keeps them.
    """

    token_ids_BT: np.ndarray
    positions_BT: np.ndarray
    rope_positions_BT: np.ndarray
    step: int
    kept_B1: np.ndarray | int = 0


@dataclass(frozen=True)
class LayerPast:
    """What one layer's cache holds after a pass."""

    k_BKSH: np.ndarray
    v_BKSH: np.ndarray
    positions_BS: np.ndarray


Pasts = Sequence[LayerPast]


def unchanged(value: Any) -> Any:
    """Nothing is other than it should be."""
    return value


def same_pasts(pasts: Pasts, step: int) -> Pasts:
    """Every layer finds in its cache what it left there."""
    return pasts


def same_logits(logits_PV: np.ndarray, tokens: Sequence[int], first: int) -> np.ndarray:
    """A row's logits as the model gives them."""
    return logits_PV


def same_layer(config: Config, layer: Layer) -> Layer:
    """The layer as it is."""
    return layer


@dataclass(frozen=True)
class Counterfactual:
    """One mistake, with its parameters.

    Attributes:
        cause: its name in the catalogue.
        parameters: as a report prints them.
        layers: where it is; None: in all of them. The last norm counts as one more; what else is no part of a layer is
            not asked.
        config: fields of the configuration that differ, as a layer sees it.
        ops: the operators that differ, of a layer.
        all_ops: the operators that differ in every layer.
        layer: the weights that differ, of a layer.
        weights: what differs in the embedding, the order of layers, the last norm or the head.
        cache: what the layers find in their caches in pass `step`, of what they left there in the pass before.
        mixes_layers: `cache` gives layers what others have left.
        codes_past: `cache` rounds what it hands over, so that noise may decide between two values.
        keeps_rows: the cache is not emptied between two batches of as many rows.
        scheme: how the cache stores vectors; None: as they are.
        fed: what is fed in place of what should be.
        prompt: what is decoded in place of a prompt.
        logits: what becomes of a row's logits, given what was fed and the first position whose logits choose a token.
        is_causal: no logit depends on a later token, and no pass on how the tokens came; then a run is one pass.
        is_of_batches: what a row gives depends on the rows that it is padded with.
    """

    cause: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: Layers = None
    config: Mapping[str, Any] = field(default_factory=dict)
    ops: Callable[[Ops], Ops] = unchanged
    all_ops: Callable[[Ops], Ops] = unchanged
    layer: Callable[[Config, Layer], Layer] = same_layer
    weights: Callable[[Weights], Weights] = unchanged
    cache: Callable[[Pasts, int], Pasts] = same_pasts
    mixes_layers: bool = False
    codes_past: bool = False
    keeps_rows: bool = False
    scheme: Scheme | None = None
    fed: Callable[[Fed], Fed] = unchanged
    prompt: Callable[[Sequence[int]], Sequence[int]] = unchanged
    logits: Callable[[np.ndarray, Sequence[int], int], np.ndarray] = same_logits
    is_causal: bool = True
    is_of_batches: bool = False

    @property
    def said(self) -> tuple[str, str]:
        """What it is, wherever it is: its cause, and its parameters in words."""
        return self.cause, str(self.parameters)

    def is_in(self, layer: int) -> bool:
        """Whether a layer has the mistake."""
        return self.layers is None or layer in self.layers


Mistakes = Sequence[Counterfactual]


def on_top_of(scheme: Scheme | None, mistakes: Mistakes) -> Mistakes:
    """Mistakes where a cache is expected to be stored so, unless the way of storing it is one of them."""
    if scheme is None or any(mistake.scheme is not None for mistake in mistakes):
        return mistakes
    expected = Counterfactual("cache-quantized", scheme=scheme, ops=partial(ops_for, scheme), is_causal=False)
    return (expected, *mistakes)


def forward_as_if(
    weights: Weights,
    fed: Fed,
    cache: Cache,
    mistakes: Mistakes,
    *,
    ops: Ops = OPS,
    trace: Trace = no_trace,
) -> np.ndarray:
    """Logits `BTV` of a pass with these mistakes; without any it is `refengine.forward`.

    Args:
        weights: right ones, of which `weights` of the mistakes has been made use already.
        cache: of the run, in which the mistakes of the cache are already.
        ops: right operators, in the order of sums that is wanted.
    """
    config = weights.config
    fed = reduce(lambda right, mistake: mistake.fed(right), mistakes, fed)
    ops = reduce(lambda right, mistake: mistake.all_ops(right), mistakes, ops)
    x_BTD = weights.embed(fed.token_ids_BT)
    trace("embed_tokens", x_BTD)
    for index, layer in enumerate(weights.layers()):
        there = [mistake for mistake in mistakes if mistake.is_in(index)]
        config_there, layer_there, ops_there = layer_as_if(config, layer, ops, there)
        rope = ops_there.rope_table(
            config_there.rope_parameters,
            config.head_dim,
            config_there.max_position_embeddings,
            fed.rope_positions_BT,
            weights.dtype,
        )
        x_BTD = block(config_there, layer_there, index, x_BTD, fed.positions_BT, rope, cache, ops_there, trace)
    there = [mistake for mistake in mistakes if mistake.is_in(config.num_hidden_layers)]
    config, ops = _config_as_if(config, there), _ops_as_if(ops, there)
    x_BTD = ops.rms_norm(x_BTD, weights.norm_D, config.rms_norm_eps)
    trace("norm", x_BTD)
    logits_BTV = np.concatenate([ops.linear(x_BTD, piece) for piece in weights.head()], axis=-1)
    trace("lm_head", logits_BTV)
    return logits_BTV


def layer_as_if(config: Config, layer: Layer, ops: Ops, mistakes: Mistakes) -> tuple[Config, Layer, Ops]:
    """What a layer with all of these mistakes computes with."""
    config_there = _config_as_if(config, mistakes)
    layer_there = reduce(lambda right, mistake: mistake.layer(config, right), mistakes, layer)
    return config_there, layer_there, _ops_as_if(ops, mistakes)


def _config_as_if(config: Config, mistakes: Mistakes) -> Config:
    return reduce(lambda right, mistake: replace(right, **mistake.config), mistakes, config)


def _ops_as_if(ops: Ops, mistakes: Mistakes) -> Ops:
    return reduce(lambda right, mistake: mistake.ops(right), mistakes, ops)
