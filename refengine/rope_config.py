"""Rotary embedding settings as `config.json` says them, in either of its spellings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refengine.config_values import Given, found, mapping, number, one_of
from refengine.errors import ConfigError

# rope_type -> the keys it needs and the keys it may have, beside rope_theta and rope_type.
ROPE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
}
LENGTH = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding settings under their `config.json` keys; those that a type does not use are None."""

    rope_type: str
    rope_theta: float
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


def rope_parameters_of(given: Given, head_dim: int) -> RopeParameters:
    """Both spellings: `rope_theta` and `rope_scaling` at the top (older), or everything in `rope_parameters`.

    Raises:
        ConfigError: a setting is missing, out of range, contradicted by another, or of a type that is not supported.
    """
    said = _said(given)
    rope_type = said.get("rope_type") or said.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise ConfigError(f"rope_type: expected one of {', '.join(ROPE_KEYS)}, found {found(rope_type)}")
    if not one_of(said.get("partial_rotary_factor"), (None, 1, 1.0)):
        raise ConfigError(f"partial_rotary_factor: expected 1.0, found {found(said['partial_rotary_factor'])}")
    needed, optional = ROPE_KEYS[rope_type]
    numbers: dict[str, Any] = {key: number(said, key) for key in needed}
    numbers |= {key: number(said, key) for key in optional if said.get(key) is not None}
    rope = RopeParameters(
        rope_type, _theta(given, said), truncate=_truncate(said) if rope_type == "yarn" else None, **numbers
    )
    _check(rope, given, said, head_dim)
    return rope


def _said(given: Given) -> Given:
    nested, scaling = mapping(given, "rope_parameters"), mapping(given, "rope_scaling")
    if nested and scaling and nested != scaling:
        raise ConfigError("rope_scaling: found beside other rope_parameters; expected one of them")
    return nested or scaling


def _theta(given: Given, said: Given) -> float:
    thetas = {float(number(where, "rope_theta")) for where in (given, said) if where.get("rope_theta") is not None}
    if len(thetas) != 1:
        which = "none" if not thetas else " and ".join(map(str, sorted(thetas)))
        raise ConfigError(f"rope_theta: expected one value, at the top or inside rope_parameters, found {which}")
    return thetas.pop()


def _truncate(said: Given) -> bool:
    if not one_of(said.get("truncate", True), (True, False)):
        raise ConfigError(f"truncate: expected true or false, found {found(said['truncate'])}")
    return bool(said.get("truncate", True))


def _check(rope: RopeParameters, given: Given, said: Given, head_dim: int) -> None:
    """Contradictions, and settings at which a variant's formula divides by zero."""
    outer = given.get(LENGTH)
    if outer is not None and outer != said.get(LENGTH, outer):
        raise ConfigError(
            f"{LENGTH}: found {found(outer)} at the top, {found(said[LENGTH])} in the rope parameters; expected one"
        )
    if rope.rope_type == "dynamic" and head_dim <= 2:
        raise ConfigError(f"head_dim: rope_type 'dynamic' needs more than 2 dimensions a head, found {head_dim}")
    if rope.rope_type == "yarn" and rope.rope_theta <= 1:
        raise ConfigError(f"rope_theta: rope_type 'yarn' needs a base above 1, found {rope.rope_theta}")
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"low_freq_factor: expected less than high_freq_factor {high}, found {low}")
