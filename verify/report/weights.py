"""What became of a checkpoint's tensors in an export, as data."""

import json
import math
from collections import Counter
from collections.abc import Mapping
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
        counted = Counter(tensor.relation for tensor in self.tensors)
        return {relation: counted[relation] for relation in RELATIONS if counted[relation]}

    @property
    def unfaithful(self) -> tuple[TensorRelation, ...]:
        """The tensors that are not there as exactly as their dtype or bits allow, in an order that computes the same.

        Rotary pairs may be neighbours where they are so in queries and keys alike.
        """
        paired = {tensor.name for tensor in self.tensors if tensor.row_order == "rotary pairs"}
        return tuple(
            tensor
            for tensor in self.tensors
            if tensor.relation not in HARMLESS and not {tensor.name, _partner(tensor.name)} <= paired
        )

    @property
    def is_faithful(self) -> bool:
        """Whether every tensor is."""
        return not self.unfaithful


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
