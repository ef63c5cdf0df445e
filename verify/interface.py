"""What a decoder export takes and gives, found by name in every exporter's spelling."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from refengine.config import Config
from refengine.errors import InputError

# past_key_values.3.key (optimum, model builder), past_key_3 (Olive), past_3_key, ...; present likewise.
CACHE_NAME = re.compile(r"(past|present)(?:[._]key[._]values)?[._](?:(\d+)[._](key|value)|(key|value)[._](\d+))")
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
USE_CACHE = "use_cache_branch"
SWITCHES = (USE_CACHE, "num_logits_to_keep")
BEAM_INPUT = "beam_idx"  # of a stateful export: which row of the past each row goes on from
NO_NUMBERS = ("object", "str")  # how names of dtypes begin that are text
CACHE_DTYPES = ("float16", "bfloat16", "float32", "float64")
QUERY_HEADS_FOR_KV_HEADS = (
    "its past was built with num_attention_heads where num_key_value_heads are wanted; export it again with "
    "past_key_values of shape [batch, num_key_value_heads, past, head_dim]"
)


@dataclass(frozen=True)
class Declared:
    """A tensor that an export declares: NumPy's name of its dtype, and per axis a size, a symbol or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    @property
    def shape_text(self) -> str:
        """The shape as a reader of an error message wants it: [batch_size, 3, ?, 64]."""
        return f"[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class LayerCache:
    """Names of one layer's keys and values; those of the past are None where there is only a present."""

    key_in: str | None
    value_in: str | None
    key_out: str
    value_out: str


@dataclass(frozen=True)
class Interface:
    """A decoder export as it declares itself.

    Attributes:
        inputs: everything that has to be fed.
        outputs: everything that it can give.
        layers: in layer order; empty where the export neither takes nor gives a cache.
        kv_heads: None where the export leaves it open, as are `head_dim` and `vocab_size`; see `resolved`.
        cache_dtype: NumPy's name; None without a cache.
        is_stateful: the export keeps its past to itself.
    """

    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]
    layers: tuple[LayerCache, ...]
    kv_heads: int | None
    head_dim: int | None
    vocab_size: int | None
    cache_dtype: str | None
    is_stateful: bool = False

    @property
    def carried(self) -> tuple[tuple[str, str], ...]:
        """What a step is fed of the one before: pairs of an input, and the output that it comes from."""
        pairs = [
            pair for layer in self.layers for pair in ((layer.key_in, layer.key_out), (layer.value_in, layer.value_out))
        ]
        return tuple((name_in, name_out) for name_in, name_out in pairs if name_in is not None)

    @property
    def has_cache(self) -> bool:
        """Whether a step can go on from the one before: it is fed what that gave, or the export has kept it."""
        return bool(self.carried) or self.is_stateful

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
        """The same, with the sizes that the export leaves open taken from the checkpoint's configuration."""
        return replace(
            self,
            kv_heads=config.num_key_value_heads if self.kv_heads is None else self.kv_heads,
            head_dim=config.head_dim if self.head_dim is None else self.head_dim,
            vocab_size=config.vocab_size if self.vocab_size is None else self.vocab_size,
        )


def interface_of(inputs: Iterable[Declared], outputs: Iterable[Declared], is_stateful: bool = False) -> Interface:
    """Works out by name, never by order, what a decoder export takes and gives.

    Raises:
        InputError: it is no decoder, or declares something that cannot be fed; the text names it.
    """
    inputs, outputs = tuple(inputs), tuple(outputs)
    past, present = _cache_names(inputs, "past"), _cache_names(outputs, "present")
    _check_inputs(inputs, {name for pair in past.values() for name in pair})
    logits = next((declared for declared in outputs if declared.name == "logits"), None)
    if logits is None or len(logits.shape) not in (0, 3):  # 0: an exporter that left the rank out
        found = ", ".join(f"{declared.name} {declared.shape_text}" for declared in outputs[:4]) or "none"
        raise InputError(
            f"outputs: expected logits of shape [batch, tokens, vocabulary], found {found}: "
            "this is no decoder with a language head"
        )
    names = {name for pair in (*past.values(), *present.values()) for name in pair}
    arrays = [declared for declared in inputs + outputs if declared.name in names]
    return Interface(
        inputs=inputs,
        outputs=outputs,
        layers=_layers(past, present),
        kv_heads=_size(arrays, 1, 4, "KV heads"),
        head_dim=_size(arrays, 3, 4, "the head size"),
        vocab_size=_size([logits], 2, 3, "the vocabulary"),
        cache_dtype=_cache_dtype(arrays),
        is_stateful=is_stateful,
    )


def check_same_model(interface: Interface, config: Config, query_heads: int | None = None) -> None:
    """Checks that an export can be of the checkpoint with this configuration.

    Args:
        interface: what the export declares; sizes that it leaves open are not compared.
        config: the checkpoint's.
        query_heads: the export's, where its graph shows them.

    Raises:
        InputError: it is not; both sides are named.
    """
    sides = [
        ("layers", len(interface.layers) or None, config.num_hidden_layers),
        ("query heads", query_heads, config.num_attention_heads),
        ("KV heads", interface.kv_heads, config.num_key_value_heads),
        ("dimensions a head", interface.head_dim, config.head_dim),
        ("tokens in its vocabulary", interface.vocab_size, config.vocab_size),
    ]
    other = [side for side in sides if side[1] not in (None, side[2])]
    if not other:
        return
    both = "; ".join(f"candidate has {found} {what}, checkpoint {expected}" for what, found, expected in other)
    if [what for what, _, _ in other] == ["KV heads"] and interface.kv_heads == config.num_attention_heads:
        raise InputError(f"{both}: {QUERY_HEADS_FOR_KV_HEADS}")
    raise InputError(f"{both}: the export is of another model")


def check_halves(first: Interface, later: Interface) -> None:
    """Checks that the file which reads prompts gives all that the one which goes on from them is fed.

    Raises:
        InputError: it does not.
    """
    if not later.carried:
        raise InputError("decoder_with_past_model: expected inputs for the past, found none; export it again")
    given = {declared.name for declared in first.outputs}
    missing = [name_out for _, name_out in later.carried if name_out not in given]
    if missing:
        raise InputError(
            f"{missing[0]}: expected it of decoder_model, which gives the past that decoder_with_past_model is fed, "
            "found no such output; export both again"
        )


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
                f"{declared.name}: declared beside {of_layer[kind]}, which is the {kind} of the same layer"
            )
        of_layer[kind] = declared.name
    for number in range(len(found)):
        missing = {"key", "value"} - found.get(number, {}).keys()
        if missing:
            raise InputError(
                f"{side}: expected a key and a value of layers 0 to {max(found)}, "
                f"found no {min(missing)} of layer {number}"
            )
    return {number: (found[number]["key"], found[number]["value"]) for number in sorted(found)}


def _layers(past: Mapping[int, tuple[str, str]], present: Mapping[int, tuple[str, str]]) -> tuple[LayerCache, ...]:
    if past and past.keys() != present.keys():
        raise InputError(
            "cache: expected a present output for each past input, found "
            f"{len(past)} layers of the past and {len(present)} of the present"
        )
    nothing: tuple[None, None] = (None, None)
    return tuple(
        LayerCache(key_in, value_in, key_out, value_out)
        for number, (key_out, value_out) in present.items()
        for key_in, value_in in [past.get(number, nothing)]
    )


def _check_inputs(inputs: Sequence[Declared], cached: set[str]) -> None:
    known = (*TOKEN_INPUTS, *SWITCHES, BEAM_INPUT, "past_key_values.N.key", "past_key_values.N.value")
    for declared in inputs:
        name, found = declared.name, declared.shape_text
        if name not in known and name not in cached:
            raise InputError(f"{name}: this input is not known, so it cannot be fed; known are {', '.join(known)}")
        if name in TOKEN_INPUTS and len(declared.shape) != 2:
            raise InputError(f"{name}: expected shape [batch, tokens], found {found}")
        if name in ("input_ids", "position_ids") and declared.dtype not in ("int64", "int32"):
            raise InputError(f"{name}: expected int64 or int32, found {declared.dtype}")
        if name == "attention_mask" and declared.dtype.startswith(NO_NUMBERS):
            raise InputError(f"{name}: expected numbers or truth values, found {declared.dtype}")
        if name in cached and len(declared.shape) != 4:
            raise InputError(f"{name}: expected shape [batch, KV heads, tokens, head size], found {found}")
    if not any(declared.name == "input_ids" for declared in inputs):
        names = ", ".join(declared.name for declared in inputs) or "none"
        raise InputError(f"inputs: expected input_ids, found {names}: this is no decoder of tokens")


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
                f"{name}: expected a cache of {', '.join(CACHE_DTYPES)}, found {dtype}: "
                "quantised caches are not supported"
            )
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} in {name}" for dtype, name in dtypes.items())
        raise InputError(f"cache: expected one dtype everywhere, found {found}")
    return next(iter(dtypes), None)
