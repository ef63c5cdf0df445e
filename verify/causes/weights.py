"""Mistakes in the weights: read from the export, and put in the place of the checkpoint's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import ml_dtypes
import numpy as np

from refengine.config import Config
from refengine.weights import EMBEDDING, HEAD, Layer, Linear, Weights
from verify.causes import Cause, Evidence, Family
from verify.causes.fused import fused_orders, with_parts_in_order
from verify.causes.pairing import DIRECTIONS, direction_of, permuted, with_permuted
from verify.causes.slots import pairs_of_layers
from verify.causes.tensors import ATTENTION, MLP, layer_of, modules_of, with_tensors, without_biases
from verify.naming.counterfactual import Counterfactual
from verify.report.weights import TensorRelation
from verify.weights.exported import ExportedCheckpoint

ROUNDED = 2.0**-7  # relative: what rounding to bfloat16 takes, and more
NARROW: Mapping[str, type] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def weights_changed(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """A tensor of the export holds other numbers than the checkpoint's: zeros, a stale copy, another one's.

    Seen: wrong from the layer of the tensor on; names and shapes are right.
    Why: an initialiser that was not filled in, a file of another training step, parts of a fused weight in another
        order than they are read in.
    Test: the reference with the export's own numbers in place of the checkpoint's, of all such tensors or of one, or of
        those that are rounded too; or with the rows of q, k and v in the order that a fused weight has, or with k and v
        exchanged.
    Fix: export again from the checkpoint; python -m verify inspect MODEL CANDIDATE lists the tensors.
    Source: ONNX issue 6655.
    """
    own = evidence.own
    for order, layers in fused_orders(evidence):
        layer = partial(with_parts_in_order, order)
        yield Counterfactual("weights-changed", {"read as q, k, v": ", ".join(order)}, layers, layer=layer)
    wrong = [] if own is None else _without_own_causes(own, _unfaithful(evidence))
    if own is None or not wrong:
        return
    changed = _own_tensors("weights-changed", evidence.config, own, [each.name for each in wrong])
    yield changed
    if rounded := _rounded_in(own):
        both = _own_tensors("weights-changed", evidence.config, own, [*(each.name for each in wrong), *rounded])
        said = {**changed.parameters, "beside": f"weights in {own.stored_as}"}
        yield replace(both, parameters=said, layers=changed.layers)
    if len(wrong) > 1:
        for each in wrong:
            yield _own_tensors("weights-changed", evidence.config, own, [each.name])


def weights_rounded(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """The export stores its weights in fewer bits than the checkpoint does.

    Seen: most tokens are right, logits are hundreds of times the float32 noise off; each tensor is the checkpoint's,
        rounded.
    Why: it was asked for, or it is a default: optimum-intel stores int8 from 1e9 parameters on.
    Test: the reference on the export's own weights, dequantised.
    Fix: nothing where that is meant (--expect auto); else export with weights in float32.
    Source: optimum-intel's default of 8-bit weights for models above 1e9 parameters.
    """
    own = evidence.own
    if own is None:
        for name, dtype in NARROW.items():
            rounded = partial(_rounded, dtype)
            yield Counterfactual("weights-rounded", {"stored_as": name}, weights=rounded)
        return
    if names := _rounded_in(own):
        made = _own_tensors("weights-rounded", evidence.config, own, names)
        yield replace(made, parameters={"stored_as": own.stored_as}, layers=None)


def qk_permuted(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Rows of q_proj or k_proj are in the order of the other rotary pairing.

    Seen: position 0 is right in all outputs, later ones are not; keys are permuted at position 0 too.
    Why: a converter permutes both for adjacent pairs (as GGUF files do), and what reads them does not undo it, or
        undoes it in one of the two, or twice.
    Test: the reference with rows of q, of k or of both permuted, either way, in all layers or in one. With both,
        outputs are those of rope-interleaved: the weights tell.
    Fix: undo the permutation where the weights are read: rows (2, head_dim / 2) of each head for (head_dim / 2, 2).
    Source: llama.cpp issue 2376; transformers issue 31766.
    """
    if evidence.own is not None:
        places = permuted(evidence.config, evidence.own)
    else:
        some = (("q", "k"), ("q",), ("k",))
        places = [(which, to, layers) for layers in evidence.suspects for which in some for to in DIRECTIONS]
    for which, direction, layers in places:
        layer = partial(with_permuted, which, direction)
        said = {"rows": " and ".join(which), "direction": direction}
        yield Counterfactual("qk-permuted", said, layers, layer=layer)


def layer_order(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Layers have each other's weights.

    Seen: wrong from the first of the layers on; the numbers of all tensors are in the export, at other layers.
    Why: names were sorted as text, so that layer 10 comes before layer 2, or shards were read in another order.
    Test: the reference with its layers in that order.
    Fix: take the number of a layer from its name.
    Source: the order of names in a safetensors file is that of text.
    """
    layers = evidence.config.num_hidden_layers
    if evidence.own is not None:
        found = _order_in(evidence.own, [each.name for each in _unfaithful(evidence)])
        orders = [found] if found else []
    else:
        orders = [_exchanged(layers, *pair) for pair in pairs_of_layers(evidence)]
        if layers > 10:
            orders.append(sorted(range(layers), key=str))
    for order in orders:
        moved = [layer for layer, source in enumerate(order) if layer != source]
        said = {"layers": {layer: order[layer] for layer in moved}}
        yield Counterfactual("layer-order", said, frozenset(moved), weights=partial(_in_order, order))


def lm_head_wrong(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """Logits are made with another matrix than the checkpoint's head: tied where it is not, or not where it is.

    Seen: everything up to the last norm is right, logits are not.
    Why: tie_word_embeddings was not read, or not passed on by the configuration of a family of models.
    Test: the reference with the embedding as its head, or with the matrix that the export has there.
    Fix: take lm_head.weight, or the embedding where tie_word_embeddings is true.
    Source: onnxruntime-genai issue 2306.
    """
    own, tied = evidence.own, evidence.config.tie_word_embeddings
    if own is None:
        if not tied:
            yield Counterfactual("lm-head-wrong", {"head": "the embedding"}, frozenset(), weights=_tied)
        return
    if HEAD not in [each.name for each in _unfaithful(evidence)]:
        return
    is_embedding = not tied and np.array_equal(own.tensor(HEAD), own.tensor(EMBEDDING))
    made = _own_tensors("lm-head-wrong", evidence.config, own, [HEAD])
    yield replace(made, parameters={"head": "the embedding" if is_embedding else "another matrix"})


def bias_dropped(evidence: Evidence) -> Iterator[Counterfactual | Family]:
    """A bias of the checkpoint is not added.

    Seen: wrong from the first token on, in models with attention_bias or mlp_bias.
    Why: the exporter writes Llamas without biases, or one of a fused projection's was lost.
    Test: the reference without the bias of q, k, v, o or the MLP, or without any, in all layers or in one.
    Fix: export with attention_bias and mlp_bias of config.json, and the tensors that end in .bias.
    Source: mlc-llm issue 3494.
    """
    config = evidence.config
    attention = ATTENTION if config.attention_bias else ()
    mlp = MLP if config.mlp_bias else ()
    groups = dict.fromkeys(
        [(*attention, *mlp), attention, mlp, attention[:3], *((each,) for each in (*attention, *mlp))]
    )
    if evidence.own is not None:
        lost = [each.name for each in _unfaithful(evidence, "missing") if each.name.endswith(".bias")]
        groups = dict.fromkeys([tuple(modules_of(lost))])
    for layers in evidence.suspects:
        for group in groups:
            if group:
                layer = partial(without_biases, frozenset(group))
                yield Counterfactual("bias-dropped", {"of": ", ".join(group)}, layers, layer=layer)


def _unfaithful(evidence: Evidence, *others: str) -> list[TensorRelation]:
    """The tensors of other numbers, or of rows in an order that is no rotary pairing; with these relations too."""
    if evidence.own is None:
        return []
    return [
        tensor
        for tensor in evidence.own.report.unfaithful
        if tensor.relation in ("changed", *others) or tensor.row_order == "other"
    ]


def _rounded_in(own: ExportedCheckpoint) -> list[str]:
    return [each.relation.name for each in own.matched if each.relation.relation in ("rounded", "quantised")]


def _without_own_causes(own: ExportedCheckpoint, wrong: Sequence[TensorRelation]) -> list[TensorRelation]:
    """Those that are no head, no bias of zeros, no queries or keys for the other pairing, and in no layer that has
    the weights of another one.
    """
    dealt = {each.relation.name for each in own.matched if direction_of(each, own.config.head_dim)}
    order = _order_in(own, [each.name for each in wrong]) or range(own.config.num_hidden_layers)
    moved = {layer for layer, source in enumerate(order) if layer != source}
    return [
        each
        for each in wrong
        if each.name != HEAD
        and each.name not in dealt
        and layer_of(each.name) not in moved
        and (not each.name.endswith(".bias") or own.tensor(each.name).any())
    ]


def _own_tensors(cause: str, config: Config, own: ExportedCheckpoint, names: Sequence[str]) -> Counterfactual:
    """The export's tensors of these names in the place of the checkpoint's."""

    @cache
    def read(name: str, dtype: np.dtype) -> np.ndarray:
        return own.tensor(name).astype(dtype)

    layers = {layer_of(name) for name in names} - {None}
    is_tied = own.config.tie_word_embeddings
    shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"
    return Counterfactual(
        cause,
        {"tensor": shown},
        frozenset(layer for layer in layers if layer is not None),
        weights=lambda right: with_tensors(right, names, read, is_tied),
    )


def _order_in(own: ExportedCheckpoint, changed: Sequence[str]) -> list[int] | None:
    """Whose norm each layer has, where that is an order of the layers; None where all are in their places."""
    norms = "model.layers.{}.input_layernorm.weight"
    layers = range(own.config.num_hidden_layers)
    right = [own.checkpoint.tensor(norms.format(layer)).astype(np.float64) for layer in layers]
    order = list(layers)
    for layer in layers:
        if norms.format(layer) in changed:
            mine = own.tensor(norms.format(layer)).astype(np.float64)
            nearest = int(np.argmin([np.abs(mine - theirs).sum() for theirs in right]))
            order[layer] = nearest if np.allclose(mine, right[nearest], rtol=ROUNDED, atol=0) else layer
    return order if order != list(layers) else None


def _exchanged(layers: int, one: int, other: int) -> list[int]:
    order = list(range(layers))
    order[one], order[other] = other, one
    return order


def _in_order(order: Sequence[int], right: Weights) -> Weights:
    def layers() -> list[Layer]:
        there = list(right.layers())
        return [there[layer] for layer in order]

    return replace(right, layers=layers)


def _tied(right: Weights) -> Weights:
    embedding_VD = right.embed(np.arange(right.config.vocab_size))
    return replace(right, head=lambda: [Linear(embedding_VD)])


def _rounded(dtype: type, right: Weights) -> Weights:
    """Matrices rounded to a narrow float; biases and norms as they are."""

    def linear(proj: Linear) -> Linear:
        return Linear(proj.weight_OI.astype(dtype).astype(right.dtype), proj.bias_O)

    def rounded(layer: Layer) -> Layer:
        return replace(
            layer,
            qkv_proj=linear(layer.qkv_proj),
            o_proj=linear(layer.o_proj),
            gate_up_proj=linear(layer.gate_up_proj),
            down_proj=linear(layer.down_proj),
        )

    layers: Callable[[], list[Layer]] = cache(lambda: [rounded(layer) for layer in right.layers()])
    head: Callable[[], list[Linear]] = cache(lambda: [linear(piece) for piece in right.head()])
    return replace(
        right,
        embed=lambda token_ids: right.embed(token_ids).astype(dtype).astype(right.dtype),
        layers=layers,
        head=head,
    )


CAUSES: tuple[Cause, ...] = (
    qk_permuted,
    layer_order,
    lm_head_wrong,
    bias_dropped,
    weights_changed,
    weights_rounded,
)
