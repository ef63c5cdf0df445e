"""What a decoder export is fed for new tokens, and what of its outputs the next step is fed."""

from collections.abc import Mapping, Sequence

import numpy as np

from verify.candidates import Past
from verify.errors import NoVerdict
from verify.interface import SWITCHES, USE_CACHE, Declared, Interface

CACHE_POINTS = ("k_cache", "v_cache")
PADDING_POSITION = 0  # what position_ids holds at padding: masked out, but it has to be in every RoPE table


def feed(
    interface: Interface, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None
) -> dict[str, np.ndarray]:
    """Every declared input, in its declared dtype, for new tokens that come after `past`.

    Args:
        interface: resolved, when the export has a cache.
        token_ids_BT: token ids, valid ones at padding too.
        positions_BT: absolute positions, -1 at padding.
        past: what `next_past` made of the step before; None starts afresh, with a cache of length 0.

    Raises:
        NoVerdict: the export cannot go on from that past or be told of this batch's padding, or takes another fixed
            shape alone.
    """
    if past is not None and past.fault:
        raise NoVerdict(past.fault)
    positions_BS = _with_past(positions_BT, past)
    if (positions_BS < 0).any() and not interface.has_attention_mask:
        raise NoVerdict(
            "attention_mask: the export has no such input, so it cannot be fed padding; "
            "compare one prompt at a time (--batch-size 1)"
        )
    values: dict[str, np.ndarray | bool | int] = {
        "input_ids": token_ids_BT,
        "attention_mask": positions_BS >= 0,
        "position_ids": np.where(positions_BT < 0, PADDING_POSITION, positions_BT),
        USE_CACHE: past is not None,
        "num_logits_to_keep": 0,  # which keeps the logits of every token
        "beam_idx": np.arange(len(token_ids_BT)),  # every row goes on from itself
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
    past: Past | None = None,
) -> Past:
    """What the step after this one is fed: the present under the names of the past, in arrays of its own.

    Args:
        interface: resolved, of an export that has a cache.
        outputs: by name, at least those of `interface.carried`.
        positions_BT: of the tokens that gave these outputs.
        past: what those tokens came after.

    Returns:
        One with a fault where a present is not as long as past and new tokens, or not as the next step has to be fed
        it: without the cache there is no such step.
    """
    positions_BS = np.array(_with_past(positions_BT, past))
    expected = (positions_BS.shape[0], interface.kv_heads, positions_BS.shape[1], interface.head_dim)
    advice = "the export's cache cannot be carried on; compare with --cache off"
    arrays = {}
    for name_in, name_out in interface.carried:
        present = outputs[name_out]
        if present.dtype.name != interface.cache_dtype:
            declared = f"{interface.cache_dtype}, as {name_in} declares"
            return Past({}, positions_BS, f"{name_out}: expected {declared}, found {present.dtype.name}: {advice}")
        if present.shape != expected:
            wanted = f"shape {expected} (rows, KV heads, past and new tokens, head size)"
            return Past({}, positions_BS, f"{name_out}: expected {wanted}, found {present.shape}: {advice}")
        arrays[name_in] = np.array(present)
    return Past(arrays, positions_BS)


def caches(interface: Interface, past: Past) -> dict[str, np.ndarray]:
    """Keys and values `x_BKSH` of a past that was handed over, by trace point; none of one with a fault."""
    if past.fault:
        return {}
    points = [f"layers.{index}.self_attn.{kind}" for index in range(len(interface.layers)) for kind in CACHE_POINTS]
    return {point: past.arrays[name] for point, (name, _) in zip(points, interface.carried, strict=True)}


def check_logits(logits: np.ndarray, shape_BT: tuple[int, ...], vocab_size: int | None) -> None:
    """Raises NoVerdict unless there are logits of every new token, or of the last of each row."""
    rows, tokens = shape_BT
    if logits.shape not in ((rows, tokens, vocab_size), (rows, 1, vocab_size)):
        raise NoVerdict(
            f"logits: expected shape {(rows, tokens, vocab_size)} (rows, new tokens, vocabulary), found {logits.shape}"
        )


def merge(first: Past, second: Past) -> Past:
    """The rows of both, the first one's before the second one's; the shorter one has empty slots in front."""
    return Past(
        {name: _stacked(array, second.arrays[name], axis=2, empty=0) for name, array in first.arrays.items()},
        _stacked(first.positions_BS, second.positions_BS, axis=1, empty=-1),
    )


def select(past: Past, rows: Sequence[int]) -> Past:
    """These rows, in this order, without the slots in front that none of them uses; in arrays of its own."""
    positions_BS = past.positions_BS[rows]
    first = int((positions_BS >= 0).any(axis=0).argmax())
    return Past({name: array[rows, :, first:] for name, array in past.arrays.items()}, positions_BS[:, first:])


def _with_past(positions_BT: np.ndarray, past: Past | None) -> np.ndarray:
    return positions_BT if past is None else np.concatenate([past.positions_BS, positions_BT], axis=1)


def _stacked(first: np.ndarray, second: np.ndarray, axis: int, empty: int) -> np.ndarray:
    """The rows of both; `axis` is that of the slots, and `empty` stands where a row has none."""
    size = max(first.shape[axis], second.shape[axis])

    def filled_up(array: np.ndarray) -> np.ndarray:
        widths = [(size - array.shape[axis] if at == axis else 0, 0) for at in range(array.ndim)]
        return np.pad(array, widths, constant_values=empty)

    return np.concatenate([filled_up(first), filled_up(second)])


def _as_declared(value: np.ndarray | bool | int, declared: Declared) -> np.ndarray:
    if declared.name in SWITCHES:  # a scalar, or one element: an axis without a size has one
        sizes = [size if isinstance(size, int) else 1 for size in declared.shape]
        return np.full(sizes, value, declared.dtype)
    return np.ascontiguousarray(value, declared.dtype)


def _empty_past(interface: Interface, batch_size: int) -> np.ndarray:
    if interface.kv_heads is None or interface.head_dim is None:
        raise ValueError("an interface with open sizes cannot be fed; use what Interface.resolved gives")
    return np.zeros((batch_size, interface.kv_heads, 0, interface.head_dim), interface.cache_dtype)


def _check_fixed_sizes(interface: Interface, fed: Mapping[str, np.ndarray]) -> None:
    for declared in interface.inputs:
        found = fed[declared.name].shape
        pairs = zip(declared.shape, found, strict=True)
        if any(isinstance(size, int) and size != actual for size, actual in pairs):
            raise NoVerdict(
                f"{declared.name}: the export takes shape {declared.shape_text} alone, and would "
                f"be fed {list(found)}; export it with dynamic axes"
            )
