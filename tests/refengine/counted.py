"""Arrays that count the operations done on them, and a codec that counts bytes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from refengine.codecs.codec import Codec
from refengine.ops import OPS, Ops
from refengine.slots import Arrays
from refengine.views import Vectors
from refengine.weights import Layer, Linear, Weights

PRODUCTS = (np.matmul, np.vecdot)
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.negative, np.exp, np.sqrt)


@dataclass
class Tally:
    """FLOPs by the part of the model that is running; a part is the operator's name, or for `linear` the weight's."""

    part: str = "residual"  # what is done outside every operator
    flops: Counter[str] = field(default_factory=Counter)
    products: int = 0  # since the part began: attention's first is the scores, its second the weighted sum

    def count(self, ufunc: np.ufunc, method: str, inputs: list[Any], result: np.ndarray) -> None:
        if result.dtype.kind != "f":
            return
        if ufunc in PRODUCTS:
            self.products += 1
            self.flops[self._within(ufunc)] += 2 * result.size * inputs[0].shape[-1]
        elif ufunc in ARITHMETIC:
            done = inputs[0].size if method == "reduce" else result.size
            self.flops[self._within(ufunc)] += done

    def _within(self, ufunc: np.ufunc) -> str:
        if self.part != "attend":
            return self.part
        if ufunc is np.matmul:
            return "scores" if self.products % 2 else "weighted_sum"
        return "scores" if ufunc is np.multiply else "softmax"


def counted_model(weights: Weights) -> tuple[Weights, Ops, Tally]:
    """The same model; passes run with these operators add to the tally."""
    tally = Tally()

    class Counted(np.ndarray):
        def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
            bare = [each.view(np.ndarray) if isinstance(each, Counted) else each for each in inputs]
            if out is not None:
                options["out"] = tuple(each.view(np.ndarray) for each in out)
            result = getattr(ufunc, method)(*bare, **options)
            tally.count(ufunc, method, bare, np.asarray(result))
            return np.asarray(result).view(Counted)

    def named(name: str, proj: Linear, names: dict[int, str]) -> Linear:
        bias_O = None if proj.bias_O is None else proj.bias_O.view(Counted)
        counted = Linear(proj.weight_OI.view(Counted), bias_O)
        names[id(counted)] = name
        return counted

    names: dict[int, str] = {}
    layers = [_layer(layer, lambda array: array.view(Counted), names, named) for layer in weights.layers()]
    head = [named("lm_head", piece, names) for piece in weights.head()]
    counted = replace(
        weights,
        embed=lambda token_ids: weights.embed(token_ids).view(Counted),
        layers=lambda: layers,
        norm_D=weights.norm_D.view(Counted),
        head=lambda: head,
    )
    operators = {each.name: _noted(each.name, getattr(OPS, each.name), names, tally) for each in fields(Ops)}
    return counted, Ops(**operators), tally


def _layer(layer: Layer, view: Callable[..., np.ndarray], names: dict[int, str], named: Callable[..., Linear]) -> Layer:
    values = {each.name: getattr(layer, each.name) for each in fields(Layer)}
    return Layer(
        **{
            name: named(name, value, names) if isinstance(value, Linear) else view(value)
            for name, value in values.items()
        }
    )


def _noted(name: str, operator: Callable[..., Any], names: dict[int, str], tally: Tally) -> Callable[..., Any]:
    """The operator, with what it does counted under its name."""

    def run(*arguments: Any) -> Any:
        tally.part = names[id(arguments[1])] if name == "linear" else name
        tally.products = 0
        result = operator(*arguments)
        tally.part = "residual"
        return result

    return run


@dataclass(frozen=True)
class Weighed(Codec):
    """A codec that notes how many bytes are read and written."""

    inner: Codec
    moved: Counter[str] = field(default_factory=Counter, compare=False)

    def empty(self, rows: int, heads: int, head_dim: int) -> Arrays:
        return self.inner.empty(rows, heads, head_dim)

    def encode(self, x_BKTH: np.ndarray) -> Arrays:
        arrays = self.inner.encode(x_BKTH)
        self.moved["written"] += sum(array.nbytes for array in arrays)
        return arrays

    def decode(self, arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        return self.inner.decode(arrays, dtype)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        return self.inner.nbytes(tokens, head_dim)

    def view(self, arrays: Arrays, tokens: int, head_dim: int, dtype: np.dtype) -> Vectors:
        self.moved["read"] += sum(array.nbytes for array in arrays)
        return self.inner.view(arrays, tokens, head_dim, dtype)
