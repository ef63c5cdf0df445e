"""What a decoder export is fed: its inputs, outputs and cache, found by name in every exporter's spelling."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from refengine.config import Config
from refengine.errors import InputError
from verify.errors import NoVerdict

if TYPE_CHECKING:
    from verify.candidates import Past

# past_key_values.3.key (optimum, model builder), past_key_3 (Olive), past_3_key, past_key_values_3_key; present likewise.
CACHE_NAME = re.compile(
    r"(past|present)(?:[._]key[._]values)?[._](?:(\d+)[._](key|value)|(key|value)[._](\d+))"
)
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
SWITCHES = ("use_cache_branch", "num_logits_to_keep")
CACHE_DTYPES = ("float16", "bfloat16", "float32", "float64")
QUERY_HEADS_FOR_KV_HEADS = (
    "its past was built with num_attention_heads where num_key_value_heads are wanted; export it again with past_key_values of "
    "shape [batch, num_key_value_heads, past, head_dim]"
)
PADDING_POSITION = (
    0  # what position_ids holds at padding: masked out, but it has to be a row of every RoPE table
)


@dataclass(frozen=True)
class Declared:
    """A tensor that an export declares: NumPy's name of its dtype, and per axis a size, a symbol, or None for neither."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class LayerCache:
    """Names of one layer's keys and values; those of the past are None where the export only gives the present."""

    key_in: str | None
    value_in: str | None
    key_out: str
    value_out: str


@dataclass(frozen=True)
class Interface:
    """A decoder export as it declares itself.

    `layers` is in layer order, and empty where the export neither takes nor gives a cache. `kv_heads`, `head_dim` and
    `vocab_size` are None where the export leaves them open, `cache_dtype` where it has no cache; `resolved` fills the sizes in.
    """

    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]
    layers: tuple[LayerCache, ...]
    kv_heads: int | None
    head_dim: int | None
    vocab_size: int | None
    cache_dtype: str | None

    @property
    def carried(self) -> tuple[tuple[str, str], ...]:
        """What a later step is fed of an earlier one: pairs of an input's name and the name of the output that it comes from."""
        pairs = [
            pair
            for layer in self.layers
            for pair in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out))
        ]
        return tuple((name_in, name_out) for name_in, name_out in pairs if name_in is not None)

    @property
    def has_cache(self) -> bool:
        """Whether a later step can be fed what an earlier one gave."""
        return bool(self.carried)

    @property
    def has_attention_mask(self) -> bool:
        """Whether padding can be told."""
        return any(declared.name == "attention_mask" for declared in self.inputs)

    @property
    def has_position_ids(self) -> bool:
        """Whether positions can be told; otherwise the export works them out by itself."""
        return any(declared.name == "position_ids" for declared in self.inputs)

    @property
    def batch_size(self) -> int | None:
        """The one number of rows that the export takes, or None when it takes any."""
        rows = next(declared for declared in self.inputs if declared.name == "input_ids").shape[0]
        return rows if isinstance(rows, int) else None

    def resolved(self, config: Config) -> "Interface":
        """The same with every size that the export leaves open taken from the checkpoint's configuration."""
        return replace(
            self,
            kv_heads=config.num_key_value_heads if self.kv_heads is None else self.kv_heads,
            head_dim=config.head_dim if self.head_dim is None else self.head_dim,
            vocab_size=config.vocab_size if self.vocab_size is None else self.vocab_size,
        )


def interface_of(inputs: Iterable[Declared], outputs: Iterable[Declared]) -> Interface:
    """Works out by name, never by order, what a decoder export takes and gives.

    Raises:
        InputError: it is no decoder, or declares something that cannot be fed; the text names it and says what is known.
    """
    inputs, outputs = tuple(inputs), tuple(outputs)
    past, present = _cache_names(inputs, "past"), _cache_names(outputs, "present")
    cached = {name for pair in past.values() for name in pair}
    _check_inputs(inputs, cached)
    logits = next((declared for declared in outputs if declared.name == "logits"), None)
    if logits is None or len(logits.shape) not in (0, 3):  # 0: an exporter that left the rank out
        found = ", ".join(f"{declared.name} {_shape_text(declared.shape)}" for declared in outputs[:4])
        raise InputError(
            f"outputs: expected logits of shape [batch, tokens, vocabulary], found {found}: this is no decoder with a language head"
        )
    layers = _layers(past, present)
    names = {name for pair in (*past.values(), *present.values()) for name in pair}
    arrays = [declared for declared in inputs + outputs if declared.name in names]
    return Interface(
        inputs=inputs,
        outputs=outputs,
        layers=layers,
        kv_heads=_size(arrays, 1, 4, "KV heads"),
        head_dim=_size(arrays, 3, 4, "the head size"),
        vocab_size=_size([logits], 2, 3, "the vocabulary"),
        cache_dtype=_cache_dtype(arrays),
    )


def check_same_model(interface: Interface, config: Config, query_heads: int | None = None) -> None:
    """Raises InputError, naming both sides, when an export cannot be of the checkpoint with this configuration.

    Args:
        interface: not resolved: what the export declares.
        config: the checkpoint's.
        query_heads: the export's, where its graph shows them.
    """
    sides = [
        ("layers", len(interface.layers) or None, config.num_hidden_layers),
        ("query heads", query_heads, config.num_attention_heads),
        ("KV heads", interface.kv_heads, config.num_key_value_heads),
        ("dimensions a head", interface.head_dim, config.head_dim),
        ("tokens in its vocabulary", interface.vocab_size, config.vocab_size),
    ]
    other = [side for side in sides if side[1] not in (None, side[2])]
    if other:
        is_repeated = [what for what, _, _ in other] == [
            "KV heads"
        ] and interface.kv_heads == config.num_attention_heads
        found = "; ".join(
            f"candidate has {found} {what}, checkpoint {expected}" for what, found, expected in other
        )
        raise InputError(
            f"{found}: {QUERY_HEADS_FOR_KV_HEADS if is_repeated else 'the export is of another model'}"
        )


def feed(
    interface: Interface, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: "Past | None" = None
) -> dict[str, np.ndarray]:
    """Every declared input, in its declared dtype, for new tokens that come after `past`.

    Args:
        interface: resolved, when the export has a cache.
        token_ids_BT: token ids, valid ones at padding too.
        positions_BT: absolute positions, -1 at padding.
        past: what `next_past` made of the step before; None starts afresh, with a cache of length 0 where there is one.

    Raises:
        NoVerdict: the export cannot take this batch: it cannot be told of padding, or has fixed another shape.
    """
    positions_BS = positions_BT if past is None else np.concatenate([past.positions_BS, positions_BT], axis=1)
    if (positions_BT < 0).any() and not interface.has_attention_mask:
        raise NoVerdict(
            "attention_mask: the export has no such input, so it cannot be fed padding; compare one prompt at a time"
        )
    values: dict[str, np.ndarray | bool | int] = {
        "input_ids": token_ids_BT,
        "attention_mask": positions_BS >= 0,
        "position_ids": np.where(positions_BT < 0, PADDING_POSITION, positions_BT),
        "use_cache_branch": past is not None,
        "num_logits_to_keep": 0,  # which keeps the logits of every token
    }
    fed = {
        declared.name: _as_declared(values[declared.name], declared)
        for declared in interface.inputs
        if declared.name in values
    }
    for name, _ in interface.carried:
        fed[name] = _empty_past(interface, len(token_ids_BT)) if past is None else past.arrays[name]
    _check_fixed_sizes(interface, fed)
    return fed


def next_past(
    interface: Interface,
    outputs: Mapping[str, np.ndarray],
    positions_BT: np.ndarray,
    past: "Past | None" = None,
) -> "Past":
    """What the step after this one is fed: the present under the names of the past, in arrays of its own.

    Raises:
        NoVerdict: a present is not the past and the new tokens, in the declared dtype.
    """
    from verify.candidates import Past

    positions_BS = positions_BT if past is None else np.concatenate([past.positions_BS, positions_BT], axis=1)
    expected = (positions_BS.shape[0], interface.kv_heads, positions_BS.shape[1], interface.head_dim)
    arrays = {}
    advice = "the export's cache cannot be carried on; compare with --cache off"
    for name_in, name_out in interface.carried:
        present = outputs[name_out]
        if present.dtype.name != interface.cache_dtype:
            raise NoVerdict(
                f"{name_out}: expected {interface.cache_dtype}, as {name_in} declares, found {present.dtype.name}: {advice}"
            )
        if present.shape != expected:
            raise NoVerdict(
                f"{name_out}: expected shape {expected} (rows, KV heads, past and new tokens, head size), "
                f"found {present.shape}: {advice}"
            )
        arrays[name_in] = np.array(present)
    return Past(arrays, np.array(positions_BS))


def _cache_names(tensors: Sequence[Declared], side: str) -> dict[int, tuple[str, str]]:
    """Layer number -> names of its key and value, on the side of the past or of the present."""
    found: dict[int, dict[str, str]] = {}
    for declared in tensors:
        match = CACHE_NAME.fullmatch(declared.name)
        if match is None or match[1] != side:
            continue
        of_layer = found.setdefault(int(match[2] or match[5]), {})
        kind = match[3] or match[4]
        if kind in of_layer:
            raise InputError(
                f"{declared.name}: declared beside {of_layer[kind]}, which is the same {kind} of the same layer"
            )
        of_layer[kind] = declared.name
    for number in range(len(found)):
        missing = {"key", "value"} - found.get(number, {}).keys()
        if missing:
            raise InputError(
                f"{side}: expected a key and a value of layers 0 to {max(found)}, found no {min(missing)} of layer {number}"
            )
    return {number: (found[number]["key"], found[number]["value"]) for number in sorted(found)}


def _layers(
    past: Mapping[int, tuple[str, str]], present: Mapping[int, tuple[str, str]]
) -> tuple[LayerCache, ...]:
    if past and past.keys() != present.keys():
        raise InputError(
            f"cache: expected a present output for each past input, found {len(past)} layers of the past and {len(present)} of the present"
        )
    nothing: tuple[None, None] = (None, None)
    return tuple(
        LayerCache(key_in, value_in, key_out, value_out)
        for number, (key_out, value_out) in present.items()
        for key_in, value_in in [past.get(number, nothing)]
    )


def _check_inputs(inputs: Sequence[Declared], cached: set[str]) -> None:
    known = (*TOKEN_INPUTS, *SWITCHES, "past_key_values.N.key", "past_key_values.N.value")
    for declared in inputs:
        if declared.name not in (*TOKEN_INPUTS, *SWITCHES) and declared.name not in cached:
            raise InputError(
                f"{declared.name}: this input is not known, so it cannot be fed; known are {', '.join(known)}"
            )
        if declared.name in TOKEN_INPUTS and len(declared.shape) != 2:
            raise InputError(
                f"{declared.name}: expected shape [batch, tokens], found {_shape_text(declared.shape)}"
            )
        if declared.name in ("input_ids", "position_ids") and declared.dtype not in ("int64", "int32"):
            raise InputError(f"{declared.name}: expected int64 or int32, found {declared.dtype}")
        if declared.name in cached and len(declared.shape) != 4:
            raise InputError(
                f"{declared.name}: expected shape [batch, KV heads, tokens, head size], found {_shape_text(declared.shape)}"
            )
    if not any(declared.name == "input_ids" for declared in inputs):
        raise InputError(
            f"inputs: expected input_ids, found {', '.join(declared.name for declared in inputs) or 'none'}: this is no decoder of tokens"
        )


def _size(arrays: Sequence[Declared], axis: int, rank: int, what: str) -> int | None:
    """The size that arrays of this rank declare on an axis; None when all leave it open."""
    sizes = {
        size: declared.name
        for declared in arrays
        if len(declared.shape) == rank and isinstance(size := declared.shape[axis], int)
    }
    if len(sizes) > 1:
        (one, first), (two, second) = list(sizes.items())[:2]
        raise InputError(
            f"cache: expected {what} to be the same everywhere, found {one} in {first} and {two} in {second}"
        )
    return next(iter(sizes), None)


def _cache_dtype(arrays: Sequence[Declared]) -> str | None:
    dtypes = {declared.dtype: declared.name for declared in arrays}
    for dtype, name in dtypes.items():
        if dtype not in CACHE_DTYPES:
            raise InputError(
                f"{name}: expected a cache of {', '.join(CACHE_DTYPES)}, found {dtype}: quantised caches are not supported"
            )
    if len(dtypes) > 1:
        raise InputError(
            "cache: expected one dtype everywhere, found "
            + " and ".join(f"{dtype} in {name}" for dtype, name in dtypes.items())
        )
    return next(iter(dtypes), None)


def _as_declared(value: np.ndarray | bool | int, declared: Declared) -> np.ndarray:
    if declared.name in SWITCHES:  # a scalar, or one element: one that says no size has one
        return np.full(
            [size if isinstance(size, int) else 1 for size in declared.shape], value, declared.dtype
        )
    return np.ascontiguousarray(value, declared.dtype)


def _empty_past(interface: Interface, batch_size: int) -> np.ndarray:
    if interface.kv_heads is None or interface.head_dim is None:
        raise ValueError(
            "an interface with open sizes cannot be fed; use the one that Interface.resolved gives"
        )
    return np.zeros((batch_size, interface.kv_heads, 0, interface.head_dim), interface.cache_dtype)


def _check_fixed_sizes(interface: Interface, fed: Mapping[str, np.ndarray]) -> None:
    for declared in interface.inputs:
        if any(
            isinstance(size, int) and size != actual
            for size, actual in zip(declared.shape, fed[declared.name].shape, strict=True)
        ):
            raise NoVerdict(
                f"{declared.name}: the export takes shape {_shape_text(declared.shape)} alone, and would be fed "
                f"{list(fed[declared.name].shape)}; export it with dynamic axes"
            )


def _shape_text(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
