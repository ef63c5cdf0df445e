"""Rotary position embedding: the inverse frequencies of each variant, and the table of a batch of positions."""

import math

import numpy as np

from refengine.errors import ConfigError
from refengine.rope_config import RopeParameters


def rope_inverse_frequencies(
    rope: RopeParameters, head_dim: int, max_position_embeddings: int, length: int
) -> tuple[np.ndarray, float]:
    """Radians a position for each pair of dimensions, and the factor on cos and sin.

    Args:
        rope: the variant and its settings.
        head_dim: H; the result has H // 2 frequencies.
        max_position_embeddings: the trained length, which `dynamic` stretches from.
        length: longest position of the pass plus one; only `dynamic` depends on it.

    Returns:
        `inv_freq_P` in float64, and the attention factor (1.0 but for `yarn`).

    Source: transformers 5.23.0, modeling_rope_utils.py, evaluated in float64 where that file rounds to float32.
    """
    theta = rope.rope_theta
    if rope.rope_type == "dynamic":
        # NTK-aware: the base grows with the sequence, and never shrinks below the trained length's.
        (factor,) = _given(rope.factor)
        stretched = factor * max(length, max_position_embeddings) / max_position_embeddings - (factor - 1)
        theta *= stretched ** (head_dim / (head_dim - 2))
    inv_freq_P = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.rope_type == "linear":
        (factor,) = _given(rope.factor)
        return inv_freq_P / factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq_P), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, inv_freq_P, head_dim), _yarn_attention_factor(rope)
    return inv_freq_P, 1.0


def rope_table(
    rope: RopeParameters,
    head_dim: int,
    max_position_embeddings: int,
    positions_BT: np.ndarray,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """`cos_BTP` and `sin_BTP` of every position; angles in float64 always, the result in `dtype`.

    `dynamic` takes each row's own longest position, so that a row never depends on its neighbours.
    """
    lengths_B = positions_BT.max(axis=1) + 1
    rows = lengths_B if rope.rope_type == "dynamic" else lengths_B[:1]
    tables = [rope_inverse_frequencies(rope, head_dim, max_position_embeddings, int(length)) for length in rows]
    inv_freq_BP = np.stack([inv_freq_P for inv_freq_P, _ in tables])
    factor = tables[0][1]
    angles_BTP = positions_BT[:, :, None] * inv_freq_BP[:, None, :]
    return (np.cos(angles_BTP) * factor).astype(dtype), (np.sin(angles_BTP) * factor).astype(dtype)


def _llama3(rope: RopeParameters, inv_freq_P: np.ndarray) -> np.ndarray:
    """Long wavelengths divided by `factor`, short ones kept, a blend linear in turns within the old context between."""
    factor, low, high, original = _given(
        rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    )
    turns_P = original * inv_freq_P / (2 * math.pi)
    kept_P = np.clip((turns_P - low) / (high - low), 0.0, 1.0)
    return inv_freq_P * (kept_P + (1 - kept_P) / factor)


def _yarn(rope: RopeParameters, inv_freq_P: np.ndarray, head_dim: int) -> np.ndarray:
    """Between `beta_fast` and `beta_slow` turns within the old context: a ramp from kept to divided by `factor`.

    Source: Peng et al. 2023, arXiv 2309.00071, section 3.2, with transformers' rounding of the ramp's ends.
    """
    factor, original = _given(rope.factor, rope.original_max_position_embeddings)

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast or 32), dimension_of(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    # The upper clamp is head_dim - 1 although there are only head_dim / 2 frequencies: models were made with it.
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    divided_P = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return inv_freq_P * (1 - divided_P + divided_P / factor)


def _yarn_attention_factor(rope: RopeParameters) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    (factor,) = _given(rope.factor)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _given(*settings: float | None) -> list[float]:
    """Settings that the variant cannot do without."""
    given = [setting for setting in settings if setting is not None]
    if len(given) < len(settings):
        raise ConfigError("rope_parameters: a setting that this rope_type needs is missing")
    return given
