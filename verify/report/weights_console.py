"""The console table of a checkpoint's tensors in an export. Plain text when not on a terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.report.weights import HARMLESS, RELATIONS, Relation, TensorRelation, WeightsReport

COLOURS: Mapping[Relation, str] = {relation: "green" if relation in HARMLESS else "red" for relation in RELATIONS}


def print_weights(report: WeightsReport, console: Console) -> None:
    """Prints the verdict on the weights, how many tensors have which relation, and all that are not equal."""
    verdict = (
        f"all {len(report.tensors)} tensors are the checkpoint's, as exactly as they are stored"
        if report.is_faithful
        else f"{len(report.unfaithful)} of {len(report.tensors)} tensors are not the checkpoint's"
    )
    console.print(f"[bold]weights[/]: {verdict}", soft_wrap=True, highlight=False)
    console.print()
    head = Table.grid(padding=(0, 2, 0, 0))
    head.add_row("model", escape(report.model))
    head.add_row("candidate", escape(f"{report.candidate} ({report.exporter})"))
    for relation, count in report.counts.items():
        of_it = [tensor for tensor in report.tensors if tensor.relation == relation]
        head.add_row(f"[{COLOURS[relation]}]{relation}[/]", escape(f"{count}{_summary(of_it)}"))
    console.print(head, highlight=False)
    different = sorted(
        (tensor for tensor in report.tensors if tensor.relation != "equal"),
        key=lambda tensor: -RELATIONS.index(tensor.relation),
    )
    if not different:
        return
    console.print()
    table = Table.grid(padding=(0, 2, 0, 0))
    for tensor in different:
        colour = COLOURS[tensor.relation]
        table.add_row(f"[{colour}]{tensor.relation}[/]", escape(f"{tensor.name}\n{_figures(tensor)}"))
    console.print(table, highlight=False)


def _summary(tensors: list[TensorRelation]) -> str:
    """How the tensors of one relation are stored, and the range of their errors."""
    blocks: dict[str, set[int]] = {tensor.dtype: set() for tensor in tensors if tensor.dtype}
    for tensor in tensors:
        if tensor.dtype and tensor.block:
            blocks[tensor.dtype].add(tensor.block)
    stored = ", ".join(
        dtype + (f" in blocks of {', '.join(map(str, sorted(sizes)))}" if sizes else "")
        for dtype, sizes in blocks.items()
    )
    errors = [tensor.error for tensor in tensors if tensor.error]
    ranged = f"; error {min(errors):.2g} to {max(errors):.2g}" if errors else ""
    return f" ({stored}{ranged})" if stored else ""


def _storage(tensor: TensorRelation) -> str:
    return f"{tensor.dtype} in blocks of {tensor.block}" if tensor.block else str(tensor.dtype)


def _figures(tensor: TensorRelation) -> str:
    parts = [f"in {tensor.stored_in}", _storage(tensor)] if tensor.stored_in else []
    if tensor.error is not None:
        parts.append(f"error {tensor.error:.3g}")
    return "; ".join([*parts, *([tensor.detail] if tensor.detail else [])]) or "nothing in the export has its numbers"
