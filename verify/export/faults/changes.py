"""Weights and tables other than they should be: what becomes of an array of an export."""

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np

from refengine.config import Config
from refengine.rope import rope_inverse_frequencies

Change = Callable[[np.ndarray, Config], np.ndarray]
ChangeOfTable = Callable[[np.ndarray, str], np.ndarray]  # of the table called "cos" or "sin"


def to_pairs(weight_IO: np.ndarray, config: Config) -> np.ndarray:
    """Outputs in the order in which neighbours are a pair, head by head."""
    halves = np.arange(config.head_dim).reshape(2, -1).T.ravel()
    return weight_IO.reshape(len(weight_IO), -1, config.head_dim)[:, :, halves].reshape(weight_IO.shape)


def by_place_in_group(weight_IO: np.ndarray, config: Config) -> np.ndarray:
    """Inputs in another order of heads: the first heads of all groups, then the second ones."""
    order = np.arange(config.num_attention_heads).reshape(config.num_key_value_heads, -1).T.ravel()
    return weight_IO.reshape(config.num_attention_heads, config.head_dim, -1)[order].reshape(weight_IO.shape)


def keys_and_values_exchanged(weight_IO: np.ndarray, config: Config) -> np.ndarray:
    """A fused weight whose keys stand where values belong."""
    ends = np.array([config.num_attention_heads, config.num_key_value_heads]).cumsum() * config.head_dim
    q, k, v = np.split(weight_IO, ends, axis=1)
    return np.concatenate([q, v, k], axis=1)


def zeroed(weight_IO: np.ndarray, config: Config) -> np.ndarray:
    """Nothing of it."""
    return np.zeros_like(weight_IO)


def scaled(factor: float) -> Change:
    """All of it times a factor."""
    return lambda weight_IO, config: weight_IO * np.float32(factor)


def with_theta(theta: float) -> Change:
    """Frequencies of another base."""

    def change(inv_freq_P: np.ndarray, config: Config) -> np.ndarray:
        rope = replace(config.rope_parameters, rope_theta=theta)
        longest = config.max_position_embeddings
        return rope_inverse_frequencies(rope, config.head_dim, longest, longest)[0]

    return change


def slower(factor: float) -> Change:
    """Frequencies divided by a factor."""
    return lambda inv_freq_P, config: inv_freq_P / factor


def in_bfloat16(array: np.ndarray, config: Config) -> np.ndarray:
    """Rounded to bfloat16."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def in_float16(table: np.ndarray, name: str) -> np.ndarray:
    """Rounded to float16."""
    return table.astype(np.float16).astype(np.float32)


def held_after(length: int) -> ChangeOfTable:
    """A table whose last row is that of an earlier position."""
    return lambda table, name: table[np.minimum(np.arange(len(table)), length - 1)]
