"""What each way of storing a cache takes and costs, as data. Fields are those of its JSON report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SCHEMA = 1


@dataclass(frozen=True)
class CacheFigures:
    """One scheme.

    Attributes:
        bytes_per_token: of the keys and values of a real cache that is filled to the longest position, scales included.
        bytes_by_formula: the same, by the scheme's formula.
        tokens_per_second: position -> tokens decoded a second there, one row.
        perplexity: of the text, decoded token by token.
        divergence: Kullback-Leibler divergence from the predictions with the float32 cache, nats a token.
        same_choice: share of positions whose likeliest token is that of the float32 cache.
    """

    scheme: str
    bytes_per_token: float
    bytes_by_formula: float
    tokens_per_second: Mapping[int, float]
    perplexity: float
    divergence: float
    same_choice: float


@dataclass(frozen=True)
class CacheStudy:
    """Every scheme on one model.

    Attributes:
        machine: processor and versions, on one line.
        model: its path.
        text_tokens: how many tokens of text were decoded, over all rows.
        row_tokens: of each row.
        schemes: float32 first.
        left_out: scheme -> why it cannot store this model's heads.
    """

    machine: str
    model: str
    text_tokens: int
    row_tokens: int
    schemes: Sequence[CacheFigures]
    left_out: Mapping[str, str]
    schema: int = field(default=SCHEMA)
