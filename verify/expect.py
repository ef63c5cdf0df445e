"""What counts as equal: the reference as it is, or with the cache, arithmetic or weights that a runtime may have."""

from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from refengine.codecs.ggml import Turned
from refengine.errors import InputError
from refengine.quant import SCHEMES
from refengine.scheme import Scheme
from verify.truth.arithmetic import ARITHMETICS, FLOAT32, Arithmetic

AUTO = "auto"  # what the runtime's own settings say
AND = "+"
WEIGHTS = ("float32", "float16", "bfloat16", "int8", "int4", "int2")  # what weights are stored as, ever more coarsely
FAMILIES = ("ov-", "ort-", "ggml-", "hf-", "kivi-")  # schemes that say in their name whose they are


@dataclass(frozen=True)
class Expectation:
    """The reference that a candidate is held against.

    Attributes:
        name: as `--expect` takes it; of one that says several things, their names joined, the cache's last.
        scheme: of the reference's cache; None where it is exact.
        arithmetic: whose noise is the unit.
        own_weights: the reference runs on the weights that the export holds, not on the checkpoint's.

    Those that say the same are equal, whatever their names.
    """

    name: str = field(compare=False)
    scheme: Scheme | None = None
    arithmetic: Arithmetic = FLOAT32
    own_weights: bool = False

    @property
    def without_cache(self) -> "Expectation":
        """Of a run without its cache, which reads keys and values as it computed them; llama.cpp has no such run."""
        arithmetic = self.arithmetic.without_cache
        if self.scheme is None or isinstance(self.scheme.keys.codec, Turned):
            return replace(self, arithmetic=arithmetic)
        name = self.name.rpartition(AND)[0] or EXACT.name
        return Expectation(name, None, arithmetic, self.own_weights)

    @property
    def coarsest_weights(self) -> str:
        """The most that its weights may be rounded, as `WEIGHTS` has it."""
        return self.name.partition(AND)[0].removesuffix("-weights") if self.own_weights else WEIGHTS[0]


EXACT = Expectation(FLOAT32.name)
TOGETHER = Expectation("uint8-activations", arithmetic=ARITHMETICS["uint8-activations"])


def expectations() -> dict[str, Expectation]:
    """By name; the scheme `int8` is expected as `int8-kv`, since a name alone could mean weights or arithmetic."""
    schemes = {
        name if name.startswith(FAMILIES) else f"{name}-kv": scheme
        for name, scheme in SCHEMES.items()
        if name not in ("float32", "float64")
    }
    return {
        EXACT.name: EXACT,
        **{each.name: Expectation(each.name, arithmetic=each) for each in ARITHMETICS.values()},
        **{f"{stored}-weights": Expectation(f"{stored}-weights", own_weights=True) for stored in WEIGHTS[1:]},
        **{name: Expectation(name, scheme) for name, scheme in schemes.items()},
    }


def int8_activations(block: int) -> Expectation:
    """Inputs of linear maps as int8, so many with one scale."""
    usual = ARITHMETICS["int8-activations"]
    name = usual.name if block == usual.block else f"{usual.name} by {block}"
    return Expectation(name, arithmetic=Arithmetic(name, block=block))


def expected(name: str) -> Expectation | None:
    """The expectation of that name, or of several joined by "+"; None is what the runtime's own settings say.

    Raises:
        InputError: there is none of that name, or two parts speak of the same thing.
    """
    if name == AUTO:
        return None
    known = expectations()
    parts = name.split(AND)
    for part in parts:
        if part not in known:
            near = get_close_matches(part, known, n=3)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(
                f"--expect: {part!r}: nothing has this name; {meant}expected {AUTO}, or names joined by {AND} of "
                f"{', '.join(known)}"
            )
    return joined(*(known[part] for part in parts))


def joined(*parts: Expectation) -> Expectation:
    """The expectation that says what all of these say. Raises InputError when two speak of the same thing."""
    said = [part for part in parts if part != EXACT]
    if len(said) < 2:
        return said[0] if said else EXACT
    arithmetics = [part.arithmetic for part in said if part.arithmetic != FLOAT32]
    dtypes = [each.dtype for each in arithmetics if each.dtype is not FLOAT32.dtype]
    blocks = [each.block for each in arithmetics if each.block is not None]
    together = [each.together for each in arithmetics if each.together]
    attentions = [each.float16_attention for each in arithmetics if each.float16_attention]
    schemes = [part.scheme for part in said if part.scheme is not None]
    # Of weights first, since that part says how coarse they may be.
    ordered = sorted(said, key=lambda part: (part.scheme is not None, not part.own_weights))
    name = AND.join(part.name for part in ordered)
    inputs, weights = len(blocks) + len(together), sum(part.own_weights for part in said)
    if max(len(dtypes), inputs, len(attentions), len(schemes), weights) > 1:
        raise InputError(f"--expect: {name}: two of these speak of the same thing; leave one of them out")
    arithmetic = FLOAT32
    if arithmetics:
        kinds = AND.join(each.name for each in arithmetics)
        dtype, block = dtypes[0] if dtypes else FLOAT32.dtype, blocks[0] if blocks else None
        arithmetic = Arithmetic(kinds, dtype, block, bool(attentions), bool(together))
    return Expectation(
        name, schemes[0] if schemes else None, arithmetic, own_weights=any(part.own_weights for part in said)
    )
