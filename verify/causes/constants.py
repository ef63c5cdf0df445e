"""Numbers that an export's graph holds, as causes take their parameters from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verify.causes import Evidence

HALF_ULP = 2.0**-24  # relative: what rounding to float32 takes at most
SAME = 50 * HALF_ULP  # relative: numbers that were rounded to float32 on different ways


@dataclass(frozen=True)
class Constant:
    """A number, or several that belong together, as the graph has it.

    Attributes:
        value: a number, or a tuple of them.
        layers: those that it has an effect in; the last norm counts as one more. None: not known.
        part: of a layer, where it is known: "input_layernorm", ...
        node: the operator that has it.
    """

    value: Any
    layers: frozenset[int] | None = None
    part: str = ""
    node: str = ""


def is_close(one: float, other: float, within: float = SAME) -> bool:
    """Whether two numbers may be one, rounded on different ways; `within` is relative."""
    return abs(one - other) <= within * max(abs(one), abs(other))


def shortest(value: float, within: float = HALF_ULP) -> float:
    """The number with the fewest digits that is this one but for rounding: 1e-05 of 9.999999747378752e-06.

    Args:
        value: a number that was read, or computed from such.
        within: relative; by default what rounding to float32 takes.
    """
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((short for short in rounded if is_close(short, value, within)), value)


def misread(
    evidence: "Evidence", name: str, is_right: Callable[[Any], bool], part: str | None = None
) -> Iterator[tuple[Any, frozenset[int] | None]]:
    """Values in the graph that are not right, each with the layers that have it; None for all of them.

    Args:
        evidence: whose constants are looked at.
        name: of the constants.
        is_right: of a value.
        part: of a layer that is looked at; None: all of them.
    """
    layers: dict[Any, set[int] | None] = {}
    for constant in evidence.constants.get(name, ()):
        if is_right(constant.value) or part not in (None, constant.part):
            continue
        known = layers.setdefault(constant.value, set())
        layers[constant.value] = None if constant.layers is None or known is None else known | constant.layers
    everywhere = set(range(evidence.config.num_hidden_layers))
    for value, found in layers.items():
        yield value, None if found is None or _is_all(found, everywhere, name) else frozenset(found)


def _is_all(found: set[int], everywhere: set[int], name: str) -> bool:
    """The last norm is no layer, but an epsilon is everywhere only if it is there too."""
    return found >= (everywhere | {len(everywhere)} if name == "rms_norm_eps" else everywhere)
