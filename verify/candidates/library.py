"""What libraries that run a model by themselves take and give, said as an export says it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from refengine.config import Config
from refengine.errors import InputError
from verify.errors import NoVerdict
from verify.interface import Declared, Interface, check_same_model, interface_of


@dataclass(frozen=True)
class Sizes:
    """Of a model that a library has opened, by that library's own account."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    def check(self, path: Path, config: Config) -> None:
        """Raises InputError unless they are those of the checkpoint with this configuration; it names both sides."""
        everything = interface_of([row_of_tokens()], [self.logits(), *self.cache("present", "float32")])
        try:
            check_same_model(everything, config, self.query_heads)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def logits(self) -> Declared:
        """Those of every token fed."""
        return Declared("logits", "float32", (None, None, self.vocab_size))

    def cache(self, side: str, dtype: str) -> list[Declared]:
        """Keys and values of every layer; `side` is past or present."""
        shape = (None, self.kv_heads, None, self.head_dim)
        return [
            Declared(f"{side}.{layer}.{kind}", dtype, shape)
            for layer in range(self.layers)
            for kind in ("key", "value")
        ]


def row_of_tokens() -> Declared:
    """Token ids of one row, and no more."""
    return Declared("input_ids", "int64", (1, None))


def keeps_its_past(sizes: Sizes) -> Interface:
    """Of a library that is fed one row, counts positions and keeps the past by itself."""
    return interface_of([row_of_tokens()], [sizes.logits()], is_stateful=True)


def check_options(runtime: str, options: Mapping[str, str], known: Collection[str]) -> None:
    """Raises NoVerdict when there is an option that this runtime does not have."""
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise NoVerdict(f"--provider-option: {runtime} has {', '.join(known)}, found {unknown!r}")


def positive(options: Mapping[str, str], name: str, otherwise: int) -> int:
    """A whole number above 0. Raises NoVerdict when what was given is none."""
    text = options.get(name, str(otherwise))
    if not text.isdecimal() or not int(text):
        raise NoVerdict(f"--provider-option: expected {name} as a whole number above 0, found {text!r}")
    return int(text)
