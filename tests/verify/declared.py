"""What decoder exports declare, in the spellings of their exporters."""

import numpy as np

from refengine.config import Config
from tests.checkpoints import TINY
from verify.candidates import Past
from verify.interface import Declared, Interface, interface_of

CONFIG = Config.from_dict(TINY | {"num_hidden_layers": 12})
K, H, V, LAYERS = CONFIG.num_key_value_heads, CONFIG.head_dim, CONFIG.vocab_size, CONFIG.num_hidden_layers
PAST, PRESENT = "past_{kind}_{n}", "present_{kind}_{n}"
KINDS = ("key", "value")


def inputs(
    spelling: str = PAST,
    *,
    layers: int = LAYERS,
    kv_heads: int | str = K,
    head_dim: int | str = H,
    dtype: str = "float32",
) -> list[Declared]:
    names = ("input_ids", "attention_mask", "position_ids")
    tokens = [Declared(name, "int64", ("batch", "tokens")) for name in names]
    shape = ("batch", kv_heads, "past", head_dim)
    cached = [spelling.format(n=n, kind=kind) for n in range(layers) for kind in KINDS]
    return tokens + [Declared(name, dtype, shape) for name in cached]


def outputs(
    spelling: str = PRESENT,
    *,
    layers: int = LAYERS,
    kv_heads: int | str = K,
    head_dim: int | str = H,
    dtype: str = "float32",
    vocab_size: int | str = V,
) -> list[Declared]:
    shape = ("batch", kv_heads, "all", head_dim)
    cached = [spelling.format(n=n, kind=kind) for n in range(layers) for kind in KINDS]
    logits = Declared("logits", "float32", ("batch", "tokens", vocab_size))
    return [logits, *(Declared(name, dtype, shape) for name in cached)]


def cached_interface(
    *, layers: int = LAYERS, kv_heads: int | str = K, head_dim: int | str = H, dtype: str = "float32"
) -> Interface:
    sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    return interface_of(inputs(**sizes), outputs(**sizes))


def without(tensors: list[Declared], name: str) -> list[Declared]:
    return [declared for declared in tensors if declared.name != name]


def past_of(interface: Interface, positions_BS: np.ndarray) -> Past:
    """A past in which every array has a value of its own."""
    shape = (positions_BS.shape[0], K, positions_BS.shape[1], H)
    names = [name_in for name_in, _ in interface.carried]
    return Past({name: np.full(shape, i, np.float32) for i, name in enumerate(names)}, positions_BS)


def presents(interface: Interface, length: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """What an export gives for one row, every array with a value of its own."""
    names = [name_out for _, name_out in interface.carried]
    return {name: np.full((1, K, length, H), i, dtype) for i, name in enumerate(names)}
