"""Exports whose key-value cache is handed on, or read, other than it should be."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import onnx

from refengine.config import Config
from verify.export.faults.writing import Edit, Fault, everywhere_and_in_one, give_as, write_faulty
from verify.export.graph import Scope, Value
from verify.export.modules import MODULES, Modules, Past, RopeTable, split_heads

MIDDLE = 5
MANY = 2**31


def newest_alone(at: Scope, q_BNTH: Value, k_BNSH: Value, v_BNSH: Value, bias_B1TS: Value, config: Config) -> Value:
    """Attention that sees the new tokens only."""
    start = at("Neg", at("Shape", q_BNTH, start=2, end=3))
    end = at.constant("end", [MANY])

    def cut(x: Value, axis: int) -> Value:
        return at("Slice", x, start, end, at.constant("axis", [axis]))

    return MODULES.attend(at, q_BNTH, cut(k_BNSH, 2), cut(v_BNSH, 2), cut(bias_B1TS, 3), config)


def hidden(newest: int = 0, oldest: int = 0) -> Any:
    """Attention that does not see so many of the newest or of the oldest tokens of the past."""

    def attend(at: Scope, q_BNTH: Value, k_BNSH: Value, v_BNSH: Value, bias_B1TS: Value, config: Config) -> Value:
        new, slots = at("Shape", q_BNTH, start=2, end=3), at("Shape", k_BNSH, start=2, end=3)
        past = at("Sub", slots, new)
        zero, one = at.constant("zero", 0), at.constant("one", 1)
        slot_S = at("Range", zero, at("Squeeze", slots), one)
        first, stop = at.constant("first", 0), at.constant("stop", oldest)
        if newest:
            first, stop = at("Sub", past, at.constant("newest", newest)), past
        is_past_S = at("Less", slot_S, past)
        inside_S = at("And", at("GreaterOrEqual", slot_S, first), at("Less", slot_S, stop))
        bias_S = at("Where", at("And", is_past_S, inside_S), at.constant("hidden", -1e38), at.constant("seen", 0.0))
        return MODULES.attend(at, q_BNTH, k_BNSH, v_BNSH, at("Min", bias_B1TS, bias_S), config)

    return attend


def with_capacity(capacity: int) -> Any:
    """Attention to a buffer of so many slots, all of which it sees."""

    def attend(at: Scope, q_BNTH: Value, k_BNSH: Value, v_BNSH: Value, bias_B1TS: Value, config: Config) -> Value:
        empty = at("Sub", at.constant("capacity", [capacity]), at("Shape", k_BNSH, start=2, end=3))
        pads = at("Concat", at.constant("no_pads", [0]), empty, axis=0)

        def padded(x: Value, axis: int) -> Value:
            return at("Pad", x, pads, "", at.constant("axis", [axis]))

        return MODULES.attend(at, q_BNTH, padded(k_BNSH, 2), padded(v_BNSH, 2), padded(bias_B1TS, 3), config)

    return attend


def caching_unrotated(
    at: Scope,
    x_BTD: Value,
    config: Config,
    table: RopeTable,
    bias_B1TS: Value,
    past: Past | None,
    modules: Modules,
) -> Value:
    """Attention that gives out its keys as they are before their rotation, and joins the past behind it."""
    if past is None:
        return MODULES.attention(at, x_BTD, config, table, bias_B1TS, past, modules)
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (at / proj for proj in ("q_proj", "k_proj", "v_proj"))
    q_BNTH, k_BKTH, v_BKTH = (
        split_heads(proj, modules.linear(proj, x_BTD, config.attention_bias), heads, H)
        for proj, heads in ((q, N), (k, K), (v, K))
    )
    (at / "k_cache")("Concat", past.key_BKSH, k_BKTH, axis=2, output=past.present_key)
    v_BKSH = (at / "v_cache")("Concat", past.value_BKSH, v_BKTH, axis=2, output=past.present_value)
    q_BNTH = modules.rotate(at / "q_rope", q_BNTH, table, H)
    k_BKSH = (at / "k_joined")("Concat", past.key_BKSH, modules.rotate(at / "k_rope", k_BKTH, table, H), axis=2)
    k_BNSH = modules.repeat_kv(at / "k_repeat", k_BKSH, config)
    v_BNSH = modules.repeat_kv(at / "v_repeat", v_BKSH, config)
    y_BTI = modules.attend(at / "attend", q_BNTH, k_BNSH, v_BNSH, bias_B1TS, config)
    return modules.linear(at / "o_proj", y_BTI, config.attention_bias)


def swap_keys_and_values_given(layers: Sequence[int] | None = None) -> Edit:
    """Gives out keys as values and values as keys, having used them rightly; of these layers, or of all."""

    def edit(model: onnx.ModelProto) -> None:
        for layer in range(_layers(model)) if layers is None else layers:
            key, value = f"present.{layer}.key", f"present.{layer}.value"
            give_as(model, {key: value, value: key})

    return edit


def give_layers_in_order_of_text(model: onnx.ModelProto) -> None:
    """Gives out the cache of layer 2 under the name of layer 10, as a list of names sorted as text would."""
    _give_layers(model, dict(enumerate(sorted(range(_layers(model)), key=str))))


def exchange_layers_given(one: int, other: int) -> Edit:
    """Gives out the caches of two layers under each other's names."""
    return lambda model: _give_layers(model, {one: other, other: one})


def give_keys_first(model: onnx.ModelProto) -> None:
    """Gives out all keys, then all values, under the names of keys and values of one layer after the other."""
    layers = _layers(model)
    given = [f"present.{layer}.{kind}" for kind in ("key", "value") for layer in range(layers)]
    names = [f"present.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    give_as(model, dict(zip(given, names, strict=True)))


def _give_layers(model: onnx.ModelProto, names: dict[int, int]) -> None:
    pairs = ((layer, name, kind) for layer, name in names.items() for kind in ("key", "value"))
    give_as(model, {f"present.{layer}.{kind}": f"present.{name}.{kind}" for layer, name, kind in pairs})


def _layers(model: onnx.ModelProto) -> int:
    return sum(output.name.endswith(".key") for output in model.graph.output)


def _edited(name: str, cause: str, layers: Sequence[int] | None, edit: Edit, *needs: Any) -> Fault:
    where = None if layers is None else frozenset(layers)
    return Fault(name, cause, where, partial(write_faulty, edit=edit), frozenset(["cache", *needs]))


def _in_attention(name: str, cause: str, fault: Any) -> tuple[Fault, Fault]:
    return everywhere_and_in_one(name, cause, "attend", fault, layer=MIDDLE, needs=["cache"])


FAULTS: Sequence[Fault] = (
    *_in_attention("past ignored", "cache-past-ignored", newest_alone),
    *_in_attention("newest 2 of the past hidden", "cache-truncated", hidden(newest=2)),
    *_in_attention("oldest 3 of the past hidden", "cache-truncated", hidden(oldest=3)),
    *_in_attention("capacity of 200 as length", "cache-capacity-as-length", with_capacity(200)),
    *everywhere_and_in_one(
        "keys cached before rope", "cache-before-rope", "attention", caching_unrotated, layer=MIDDLE, needs=["cache"]
    ),
    _edited("keys and values swapped", "cache-key-value-swapped", None, swap_keys_and_values_given()),
    _edited(
        f"keys and values swapped, layer {MIDDLE}",
        "cache-key-value-swapped",
        [MIDDLE],
        swap_keys_and_values_given([MIDDLE]),
    ),
    _edited("layers of the cache as text", "cache-layer-order", None, give_layers_in_order_of_text, "ten layers"),
    _edited("layers 4 and 7 of the cache exchanged", "cache-layer-order", [4, 7], exchange_layers_given(4, 7)),
    _edited("keys first in the cache", "cache-layer-order", None, give_keys_first),
)
