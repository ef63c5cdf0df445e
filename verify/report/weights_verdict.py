"""What a comparison says of the export's weights: how they differ, what that costs, and whether it is the cause."""

from verify.report.result import Report
from verify.report.weights import ExportedWeights, WeightsCost


def weights_line(weights: ExportedWeights) -> str:
    """How an export's weights follow from the checkpoint's, and what that costs."""
    if weights.counts.keys() == {"equal"}:
        return "the checkpoint's"
    counts = ", ".join(f"{count} {relation}" for relation, count in weights.counts.items())
    return f"{counts}; the coarsest are {weights.stored_as}{'' if weights.cost is None else f'; {_cost(weights.cost)}'}"


def cause_in_weights(report: Report) -> str | None:
    """The cause of a drift or mismatch, where the export has other weights than rounding makes of the checkpoint's."""
    if report.weights is None or not report.weights.unfaithful:
        return None
    names = [tensor.name for tensor in report.weights.unfaithful]
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"the export's weights are not the checkpoint's: {names[0]}{others}"


def _cost(cost: WeightsCost) -> str:
    return (
        f"in exact arithmetic they change {cost.changed} of {cost.tokens} tokens, the Kullback-Leibler divergence is "
        f"{cost.divergence:.2g} nats ({cost.largest_divergence:.2g} at most), and perplexity goes from "
        f"{cost.perplexity:.4g} to {cost.own_perplexity:.4g}"
    )
