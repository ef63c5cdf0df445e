"""What counts as equal: the reference as it is, or the reference with the cache that a runtime is expected to have."""

from dataclasses import dataclass

from refengine.quant import SCHEMES
from refengine.scheme import Scheme

AUTO = "auto"  # what the runtime's own settings say
FAMILIES = ("ov-", "ort-", "ggml-", "hf-", "kivi-")  # schemes that say in their name whose they are


@dataclass(frozen=True)
class Expectation:
    """The reference that a candidate is held against.

    Attributes:
        name: as `--expect` takes it.
        scheme: of the reference's cache; None where it is exact.
    """

    name: str
    scheme: Scheme | None


EXACT = Expectation("float32", None)


def expectations() -> dict[str, Expectation]:
    """By name; the scheme `int8` is expected as `int8-kv`, since a name alone could mean weights or arithmetic."""
    schemes = {
        name if name.startswith(FAMILIES) else f"{name}-kv": scheme
        for name, scheme in SCHEMES.items()
        if name not in ("float32", "float64")
    }
    return {EXACT.name: EXACT, **{name: Expectation(name, scheme) for name, scheme in schemes.items()}}


def expected(name: str) -> Expectation | None:
    """The expectation of that name; None is what the runtime's own settings say."""
    return None if name == AUTO else expectations()[name]
