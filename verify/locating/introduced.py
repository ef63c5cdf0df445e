"""Which parts of a model bring an error in, and which only carry one on: each is held against its own input."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from refengine.config import Config
from refengine.kvcache import Cache, KVCache
from refengine.model import attention, mlp
from refengine.ops import OPS, Ops
from refengine.quant import ops_for
from refengine.scheme import stored_as
from refengine.trace import Trace, no_trace
from refengine.weights import Layer, Weights
from verify.locating.flow import Flow
from verify.locating.sample import Sample, Streams
from verify.truth.arithmetic import FLOAT32
from verify.truth.codes import Given, GivenCache, can_be_given, is_whole
from verify.truth.noise import Noise, rms
from verify.truth.reference import Reference

ORDERS = 4  # whose noise tells parts that are clearly wrong from others
CLEARLY = 3.0  # times the bound: every part is one draw more, and a model has hundreds
CACHED = ("self_attn.k_cache", "self_attn.v_cache")


@dataclass(frozen=True)
class Part:
    """A part of the model, computed from what the candidate itself had before it.

    Attributes:
        layer: it is in; None before the first and behind the last.
        point: what it ends in, of `refengine.trace`.
        ratio: noise ratio over all positions.
        excess: how many times what is honest that is, or what the worst position has if that is more.
        row, position: the earliest position that has clearly left the noise, or else the worst; of the sample's row.
        noise: what is honest at each position.
    """

    layer: int | None
    point: str
    ratio: float
    excess: float
    row: int
    position: int
    noise: Noise = field(compare=False, repr=False)


@dataclass(frozen=True)
class Arithmetics:
    """The truth and the noise: weights and operators in float64, and those of every equivalent order."""

    truth: tuple[Weights, Ops]
    noisy: tuple[Weights, Mapping[str, Ops]]
    engine: Reference

    @classmethod
    def of(cls, engine: Reference, positions: int) -> "Arithmetics":
        """Those of a reference, for so many positions."""
        ops = OPS if engine.scheme is None else ops_for(engine.scheme)
        return cls((Weights.open(engine.checkpoint, np.float64, resident=False), ops), engine.noisy(positions), engine)

    def cache(self, config: Config, rows: int, dtype: np.dtype) -> KVCache:
        """An empty one, as the reference has it."""
        return KVCache(config, rows, self.engine.scheme or stored_as(dtype))

    def given(self, streams: Streams, layer: int) -> Given | None:
        """What a layer's cache of codes held, as that of the only layer; None where that is not known."""
        scheme, lengths = self.engine.scheme, (streams.sample.positions_BT >= 0).sum(axis=1).tolist()
        shown = {point: streams.traced.run.caches.get(f"layers.{layer}.{point}", ()) for point in CACHED}
        if scheme is None or self.engine.arithmetic != FLOAT32 or not is_whole(shown, lengths):
            return None
        held = {f"layers.0.{point}": np.concatenate(rows) for point, rows in shown.items()}
        return Given(held, np.cumsum([0, *lengths[:-1]])) if can_be_given(scheme, held) else None


def parts(flow: Flow, streams: Streams, arithmetics: Arithmetics) -> Iterator[Part]:
    """Every part of the model in order, but for those whose input or output was not shown."""
    weights, ops = arithmetics.truth
    noisy, all_orders = arithmetics.noisy
    orders = dict(islice(all_orders.items(), ORDERS))
    sample = streams.sample
    there_BT = sample.positions_BT >= 0

    def part(layer: int | None, point: str, given_PX: np.ndarray, right: np.ndarray, others: list[np.ndarray]) -> Part:
        return _part(sample, layer, point, given_PX, right, _errors(right, others))

    stream = None if flow.embedding is None else streams.whole(flow.embedding)
    if stream is not None:
        embedded = [each.embed(sample.token_ids_BT)[there_BT] for each in (weights, noisy)]
        yield part(None, "embed_tokens", stream[there_BT], embedded[0], embedded[1:] * 2)  # noise is never of one order
    halves = iter([None if (shown := streams.whole(name)) is None else shown for name in flow.sums])
    for layer, (right, close) in enumerate(zip(weights.layers(), noisy.layers(), strict=True)):
        middle, end = next(halves, None), next(halves, None)
        if stream is not None:
            given = arithmetics.given(streams, layer)
            honest = _attended(arithmetics, weights, right, ops, stream, sample, given)
            runs = [_attended(arithmetics, noisy, close, order, stream, sample, given) for order in orders.values()]
            errors = {point: _errors(honest[point], [run[point] for run in runs]) for point in honest}
            if given is not None:
                near = _with_noise(given, honest, errors)
                honest = _attended(arithmetics, weights, right, ops, stream, sample, near)
            for point in CACHED:
                shown = streams.caches(f"layers.{layer}.{point}")
                if shown is not None:
                    yield _part(sample, layer, point, shown, honest[point], errors[point])
            if middle is not None:
                residual = middle[there_BT], honest["residual"], errors["residual"]
                yield _part(sample, layer, "self_attn.residual", *residual)
        if middle is not None and end is not None:
            values = [_after_mlp(weights, right, ops, middle, there_BT)]
            values += [_after_mlp(noisy, close, order, middle, there_BT) for order in orders.values()]
            yield part(layer, "mlp.residual", end[there_BT], values[0], values[1:])
        stream = end
    if stream is not None:
        yield from _head(streams, arithmetics, stream)


def _errors(right_PX: np.ndarray, others: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [rms(other_PX - right_PX, axis=-1) for other_PX in others]


def _with_noise(given: Given, right: Mapping[str, np.ndarray], errors: Mapping[str, list[np.ndarray]]) -> Given:
    """With how far honest noise may move what comes to the cache."""
    noise = {f"layers.0.{point}": Noise.of(errors[point], right[point]).honest_P for point in CACHED}
    return replace(given, noise=noise)


def attended(
    config: Config,
    layer: Layer,
    x_BTD: np.ndarray,
    positions_BT: np.ndarray,
    cache: Cache,
    ops: Ops,
    dtype: np.dtype,
    trace: Trace = no_trace,
) -> np.ndarray:
    """The residual stream after attention, of the first layer of a model of one."""
    rope = ops.rope_table(config.rope_parameters, config.head_dim, config.max_position_embeddings, positions_BT, dtype)
    h_BTD = ops.rms_norm(x_BTD, layer.input_layernorm_D, config.rms_norm_eps)
    trace("layers.0.input_layernorm", h_BTD)
    return x_BTD + attention(config, layer, 0, h_BTD, positions_BT, rope, cache, ops, trace)


def _attended(
    arithmetics: Arithmetics,
    weights: Weights,
    layer: Layer,
    ops: Ops,
    x_BTD: np.ndarray,
    sample: Sample,
    given: Given | None,
) -> dict[str, np.ndarray]:
    """Keys, values and the residual stream after attention, at every position of every row.

    With a cache that is given without noise, keys and values are as they came to it; otherwise as they are read.
    """
    config = replace(weights.config, num_hidden_layers=1)
    positions_BT = sample.positions_BT
    there_BT = positions_BT >= 0
    x_BTD = as_stream(weights, x_BTD, there_BT)
    scheme = arithmetics.engine.scheme
    cache: KVCache | GivenCache = arithmetics.cache(config, len(x_BTD), weights.dtype)
    if given is not None and scheme is not None:
        cache = GivenCache(scheme, given, positions_BT[:, :0])
    in_passes = scheme is not None
    numbers = range(len(sample.tokens[0])) if in_passes else [None]
    pieces = [
        attended(config, layer, x_BTD[:, columns], positions_BT[:, columns], cache, ops, weights.dtype)
        for columns in (slice(None) if number is None else sample.columns(number) for number in numbers)
    ]
    return {**_kept(cache, weights.dtype, there_BT), "residual": np.concatenate(pieces, axis=1)[there_BT]}


def _kept(cache: KVCache | GivenCache, dtype: np.dtype, there_BT: np.ndarray) -> dict[str, np.ndarray]:
    if isinstance(cache, GivenCache):
        kept = cache.brought if cache.given.noise is None else cache.read
        return {point: kept[f"layers.0.{point}"].reshape(there_BT.sum(), -1) for point in CACHED}
    arrays = zip(CACHED, cache.read(0, dtype), strict=True)
    return {point: x_BKSH.swapaxes(1, 2)[there_BT].reshape(there_BT.sum(), -1) for point, x_BKSH in arrays}


def as_stream(weights: Weights, x_BTD: np.ndarray, there_BT: np.ndarray) -> np.ndarray:
    """The candidate's residual stream as the reference takes it in: in its own dtype, and 0 at padding."""
    dtype = weights.embed(np.zeros((1, 1), np.int64)).dtype
    return np.where(there_BT[..., None], x_BTD, 0).astype(dtype)


def _after_mlp(weights: Weights, layer: Layer, ops: Ops, x_BTD: np.ndarray, there_BT: np.ndarray) -> np.ndarray:
    x_BTD = as_stream(weights, x_BTD, there_BT)
    h_BTD = ops.rms_norm(x_BTD, layer.post_attention_layernorm_D, weights.config.rms_norm_eps)
    y_BTD: np.ndarray = (x_BTD + mlp(weights.config, layer, "", h_BTD, ops, no_trace))[there_BT]
    return y_BTD


def _head(streams: Streams, arithmetics: Arithmetics, x_BTD: np.ndarray) -> Iterator[Part]:
    """The last norm and the head, at the positions whose logits the candidate gives."""
    sample = streams.sample
    there_BT = sample.positions_BT >= 0
    rows = streams.traced.run.logits
    given = np.concatenate(rows)
    lengths = there_BT.sum(axis=1)
    last_P = np.concatenate([np.arange(length) >= length - len(row) for length, row in zip(lengths, rows, strict=True)])

    def logits(weights: Weights, ops: Ops) -> np.ndarray:
        x_PD = as_stream(weights, x_BTD, there_BT)[there_BT][last_P][None]
        h_PD = ops.rms_norm(x_PD, weights.norm_D, weights.config.rms_norm_eps)
        return np.concatenate([ops.linear(h_PD, piece) for piece in weights.head()], axis=-1)[0]

    weights, ops = arithmetics.truth
    noisy, orders = arithmetics.noisy
    right = logits(weights, ops)
    errors = _errors(right, [logits(noisy, order) for order in orders.values()])
    yield _part(sample, None, "lm_head", given, right, errors, last_P)


def _part(
    sample: Sample,
    layer: int | None,
    point: str,
    given_PX: np.ndarray,
    right_PX: np.ndarray,
    errors: Sequence[np.ndarray],
    shown_P: np.ndarray | None = None,
) -> Part:
    noise = Noise.of(errors, right_PX)
    error_P = rms(given_PX - right_PX, axis=-1)
    ratio_P = error_P / noise.rms_P
    ratio = float(rms(error_P) / rms(noise.rms_P))
    there_BT = sample.positions_BT >= 0
    row_P, column_P = np.nonzero(there_BT)
    position_P = sample.positions_BT[row_P, column_P]
    if shown_P is not None:
        row_P, position_P = row_P[shown_P], position_P[shown_P]
    beyond = np.flatnonzero(~(ratio_P <= CLEARLY * noise.position_bound))
    first = int(beyond[position_P[beyond].argmin()]) if beyond.size else int(ratio_P.argmax())
    excess = max(ratio / noise.overall_bound, float(ratio_P.max()) / noise.position_bound)
    excess = float("inf") if np.isnan(excess) or np.isnan(ratio) else excess
    return Part(layer, point, ratio, excess, int(row_P[first]), int(position_P[first]), noise)


def wrong_parts(found: Sequence[Part], something_is: bool) -> list[Part]:
    """Those that are clearly wrong; where none is although something is, the one that is furthest from right."""
    clearly = [part for part in found if part.excess > CLEARLY]
    worst = max(found, key=lambda part: part.excess, default=None)
    return clearly or ([worst] if something_is and worst is not None and worst.excess > 1 else [])
