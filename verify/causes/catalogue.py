"""Every cause by its name, in the order in which they are listed."""

from collections.abc import Mapping
from itertools import chain

from verify.causes import Cause, attention, cache, driver, norm_mlp, precision, rope, runtime, weights

FAMILIES = (weights, rope, attention, norm_mlp, cache, precision, driver, runtime)


def name_of(cause: Cause) -> str:
    """Its name in the catalogue: "rope-theta" of `rope_theta`."""
    return cause.__name__.replace("_", "-")


CATALOGUE: Mapping[str, Cause] = {
    name_of(cause): cause for cause in chain.from_iterable(family.CAUSES for family in FAMILIES)
}
