"""What became of a checkpoint's tensors in an export, as data."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Relation = Literal["equal", "rounded", "quantised", "permuted", "changed", "missing"]
RowOrder = Literal["rotary pairs", "other"]
RELATIONS: tuple[Relation, ...] = ("equal", "rounded", "quantised", "permuted", "changed", "missing")
HARMLESS: tuple[Relation, ...] = ("equal", "rounded", "quantised")


@dataclass(frozen=True)
class TensorRelation:
    """One tensor of a checkpoint, and what an export holds in its place.

    Attributes:
        name: the checkpoint's.
        relation: how the stored numbers follow from the checkpoint's; "permuted" is equal, rounded or quantised, too,
            but for the order of the rows.
        stored_in: the weight of the graph; None when missing.
        dtype: that the numbers are rounded to, or that the codes are stored in; None when missing.
        bits: of a code, where the weight is quantised.
        block: codes that share a scale, where it is quantised.
        error: rms of the difference over rms of the tensor; 0 when equal, None when missing.
        row_order: of a permuted one: "rotary pairs" where the two numbers that are turned together are neighbours, as
            in an interleaved rotary embedding, "other" otherwise; None when in order.
        detail: which rows of a fused weight, which factor, which order, what is wrong; empty when nothing is to say.
    """

    name: str
    relation: Relation
    stored_in: str | None = None
    dtype: str | None = None
    bits: int | None = None
    block: int | None = None
    error: float | None = None
    row_order: RowOrder | None = None
    detail: str = ""


@dataclass(frozen=True)
class WeightsReport:
    """Every tensor of a checkpoint, in the checkpoint's order."""

    model: str
    candidate: str
    exporter: str
    tensors: tuple[TensorRelation, ...]

    @property
    def counts(self) -> Mapping[Relation, int]:
        """How many tensors have each relation that occurs."""
        return counted(self.tensors)

    @property
    def unfaithful(self) -> tuple[TensorRelation, ...]:
        """Those that are not as they should be."""
        return unfaithful(self.tensors)

    @property
    def is_faithful(self) -> bool:
        """Whether every tensor is."""
        return not self.unfaithful


@dataclass(frozen=True)
class WeightsCost:
    """What an export's own weights cost against the checkpoint's: the reference with both, over the same tokens.

    Attributes:
        tokens: choices compared, after the checkpoint's own tokens.
        changed: how many of them another token would win.
        divergence: Kullback-Leibler, of the export's predictions from the checkpoint's, the mean over all positions
            of prompts and new tokens; in nats.
        largest_divergence: at the worst position.
        perplexity: of the checkpoint on the prompts and its new tokens.
        own_perplexity: of the export's weights on the same.
    """

    tokens: int
    changed: int
    divergence: float
    largest_divergence: float
    perplexity: float
    own_perplexity: float


@dataclass(frozen=True)
class ExportedWeights:
    """The weights of an export that was compared.

    Attributes:
        stored_as: the coarsest of what holds its tensors: "float16", "bfloat16", "int8", "int4" or "int2"; "float32"
            where float32 could do no better.
        counts: how many tensors have each relation that occurs.
        unfaithful: the tensors that are not there as exactly as their dtype or bits allow.
        borrowed: those that the export has no place for; in its own weights the checkpoint's stand for them.
        cost: what its own weights cost; None where they are the checkpoint's, or not all finite, or where nothing ran.
    """

    stored_as: str
    counts: Mapping[Relation, int]
    unfaithful: tuple[TensorRelation, ...]
    borrowed: tuple[str, ...]
    cost: WeightsCost | None = None


def counted(tensors: Sequence[TensorRelation]) -> dict[Relation, int]:
    """How many tensors have each relation that occurs."""
    found = Counter(tensor.relation for tensor in tensors)
    return {relation: found[relation] for relation in RELATIONS if found[relation]}


def unfaithful(tensors: Sequence[TensorRelation]) -> tuple[TensorRelation, ...]:
    """The tensors that are not there as exactly as their dtype or bits allow, in an order that computes the same.

    Rotary pairs may be neighbours where they are so in queries and keys alike.
    """
    paired = {tensor.name for tensor in tensors if tensor.row_order == "rotary pairs"}
    return tuple(
        tensor
        for tensor in tensors
        if tensor.relation not in HARMLESS and not {tensor.name, _partner(tensor.name)} <= paired
    )


def _partner(name: str) -> str:
    """Of a query's tensor the key's, and the other way round."""
    return name.replace("q_proj", "k_proj") if "q_proj" in name else name.replace("k_proj", "q_proj")


def weights_as_json(report: WeightsReport) -> str:
    """The report as a JSON object on lines; an error that is not finite is the string "nan" or "inf"."""
    fields = asdict(report)
    for tensor in fields["tensors"]:
        if tensor["error"] is not None and not math.isfinite(tensor["error"]):
            tensor["error"] = str(tensor["error"])
    whole = {"schema": 1, "is_faithful": report.is_faithful, "counts": report.counts, **fields}
    return json.dumps(whole, indent=2, allow_nan=False) + "\n"
