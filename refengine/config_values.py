"""Values of a parsed JSON object, checked as they are taken out; every error names the key."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from refengine.errors import ConfigError

Given = Mapping[str, Any]


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is a whole number (true and false are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a JSON value of any type is one of some; unlike `in`, true is not 1."""
    return any(type(value) is type(one) and value == one for one in allowed)


def whole_number(given: Given, key: str) -> int:
    """A positive whole number; its absence is an error."""
    value = given.get(key)
    if not is_whole(value) or not 0 < value < 2**31:
        raise ConfigError(f"{key}: expected a positive whole number, found {found(value)}")
    return int(value)


def number(given: Given, key: str) -> float:
    """A positive finite number; its absence is an error."""
    value = given.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or value > 1e300:
        raise ConfigError(f"{key}: expected a positive number, found {found(value)}")
    return value


def flag(given: Given, key: str) -> bool:
    """True or false; absent and null are false."""
    value = given.get(key)
    if not one_of(value, (None, False, True)):
        raise ConfigError(f"{key}: expected true or false, found {found(value)}")
    return bool(value)


def token_or_none(given: Given, key: str) -> int | None:
    """A token id, or None where it is absent or null."""
    value = given.get(key)
    if value is not None and not (is_whole(value) and value >= 0):
        raise ConfigError(f"{key}: expected a token id, found {found(value)}")
    return value


def mapping(given: Given, key: str) -> Given:
    """A nested object; absent and null are empty."""
    value = given.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{key}: expected an object, found {found(value)}")
    return value or {}


def found(value: Any) -> str:
    """A JSON value as an error shows it: on one line, and not longer than that."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
