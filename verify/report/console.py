"""The console report: verdict, cause, what to do, then the figures. Plain text when not on a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verify.report.diagnosis import cause_in_words, details, to_do_in_words
from verify.report.figures import figure
from verify.report.result import Cell, Judgement, Report
from verify.report.weights_verdict import cause_in_weights, weights_line

COLOURS: Mapping[str, str] = {"equal": "green", "drift": "yellow", "mismatch": "red", "no-verdict": "magenta"}


def print_report(report: Report, console: Console) -> None:
    """Prints a comparison. The first line is the verdict, the second the cause, the third what to do."""
    colour = COLOURS[report.verdict]
    console.print(f"[bold {colour}]{report.verdict}[/]: {escape(_verdict(report))}", soft_wrap=True, highlight=False)
    console.print(f"cause: {escape(_cause(report))}", soft_wrap=True, highlight=False)
    console.print(f"to do: {escape(_to_do(report))}", soft_wrap=True, highlight=False)
    console.print()
    _print_subject(report, console)
    console.print(_table(report.cells))
    console.print()
    for cell in report.cells:
        _print_details(cell, console)
    for detail in details(report.diagnosed) if report.diagnosed else ():
        console.print(escape(detail), soft_wrap=True, highlight=False)
    for note in report.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True, highlight=False)
    for hidden in report.not_revealed:
        console.print(f"not revealed: {escape(hidden)}", soft_wrap=True, highlight=False)


def print_facts(facts: Sequence[tuple[str, str]], console: Console) -> None:
    """Prints pairs of a heading and a text, each text beside its heading."""
    table = Table.grid(padding=(0, 2))
    for heading, text in facts:
        table.add_row(f"[bold]{escape(heading)}[/]", escape(text))
    console.print(table, highlight=False)


def print_explanation(name: str, what: str, sections: Sequence[tuple[str, str]], console: Console) -> None:
    """Prints a cause's name, what is wrong, and each section beside its heading."""
    console.print(f"[bold]{escape(name)}[/]: {escape(what)}", highlight=False)
    print_facts(sections, console)


def _verdict(report: Report) -> str:
    concerned = [cell for cell in report.cells if cell.verdict == report.verdict]
    expected = sorted({cell.expect for cell in concerned})
    ties = sum(cell.tokens.ties for cell in concerned if cell.tokens)
    tied = f" ({ties} of them ties within the noise)" if ties else ""
    if report.verdict == "equal":
        compared = sum(cell.tokens.compared for cell in report.cells if cell.tokens)
        runs = "1 run" if len(report.cells) == 1 else f"{len(report.cells)} runs"
        whose = f"all {compared} tokens of {runs} are {_whose(report)}{tied}"
        if any(cell.noise_ratio is None for cell in report.cells):
            return f"{whose}; how far its logits are off was not recorded"
        honest = "honest float32" if expected == ["float32"] else f"what is expected ({', '.join(expected)})"
        return f"{whose}, and the {_judged(report)} are {honest}"
    where = ", ".join(_name(cell, " with cache ") for cell in concerned)
    unit = " or ".join(expected)
    judged = "keys and values" if all(map(_strays_in_cache_alone, concerned)) else f"the {_judged(report)}"
    return {
        "drift": f"every token is right{tied}, but {judged} are further off than {unit} explains, on {where}",
        "mismatch": f"tokens differ that {unit} noise cannot explain, on {where}",
        "no-verdict": f"the candidate could not be run to the end, on {where}",
    }[report.verdict]


def _whose(report: Report) -> str:
    on_own = any(cell.also and cell.also.weights == "checkpoint" for cell in report.cells)
    return "what the export's own weights give" if on_own else "the checkpoint's"


def _judged(report: Report) -> str:
    return "logprobs" if any(cell.logprobs for cell in report.cells) else "logits"


def _strays_in_cache_alone(cell: Cell) -> bool:
    noise = cell.noise_ratio
    return noise is not None and bool(noise.cache_beyond) and noise.has_logits_within


def _name(cell: Cell, cache: str) -> str:
    return cell.runtime if cell.cache == "unknown" else f"{cell.runtime}{cache}{cell.cache}"


def _cause(report: Report) -> str:
    reason = next((cell.reason for cell in report.cells if cell.reason), None)
    if report.verdict == "no-verdict" and reason:
        return reason
    if report.is_explained_by_settings:
        return f"what its own settings say: held against that ({', '.join(_explanations(report))}), it is equal"
    if report.diagnosis == "none":
        return "none to look for"
    if report.diagnosed is not None and report.diagnosed.status != "unexplained":
        return cause_in_words(report.diagnosed)
    in_weights = cause_in_weights(report)
    if in_weights or report.diagnosed is None:
        return in_weights or "not looked for"
    return cause_in_words(report.diagnosed)


def _explanations(report: Report) -> list[str]:
    return sorted({cell.explained_by for cell in report.cells if cell.explained_by is not None})


def _to_do(report: Report) -> str:
    if report.verdict == "equal" and report.diagnosis == "none":
        return "nothing"
    if report.verdict == "no-verdict":
        return "put right what the cause names, or compare on another runtime (--runtime)"
    if report.is_explained_by_settings:
        return (
            "nothing where that is meant (--expect auto says so); else export the weights in float32, and ask "
            "the runtime for it (--provider-option)"
        )
    if report.diagnosed is not None and (fix := to_do_in_words(report.diagnosed)) is not None:
        return fix
    if all(cell.cache == "unknown" for cell in report.cells):
        return "look at the system that decoded this: its weights and dtype, its prompts, and whether it was greedy"
    if cause_in_weights(report):
        return "look at the weights first: python -m verify inspect MODEL CANDIDATE"
    on_cpu = [cell.verdict == "equal" for cell in report.cells if cell.runtime == "ort-cpu"]
    if on_cpu and all(on_cpu):
        return "look at the provider and its options: the export is equal on the plain CPU"
    verdicts = {(cell.runtime, cell.cache): cell.verdict for cell in report.cells}
    if any(
        verdict != "equal" and cache == "on" and verdicts.get((runtime, "off")) == "equal"
        for (runtime, cache), verdict in verdicts.items()
    ):
        return "look at the cache first: without it the export is equal"
    if on_cpu:
        return "look at the export: it differs on the plain CPU too"
    return "compare with --runtime ort-cpu too: if it is equal there, the provider is at fault, otherwise the export"


def _print_subject(report: Report, console: Console) -> None:
    lines = Table.grid(padding=(0, 2))
    lines.add_row(
        "model", f"{escape(report.model.path)} ({report.model.model_type}, sha256 {report.model.sha256[:12]})"
    )
    candidate = report.candidate
    fingerprint = f", sha256 {candidate.sha256[:12]}" if candidate.sha256 else ""
    lines.add_row("candidate", f"{escape(candidate.path)} ({escape(candidate.exporter)}{fingerprint})")
    if report.weights is not None:
        lines.add_row("weights", weights_line(report.weights))
    lines.add_row("prompts", f"{report.prompts}, {_new_tokens(report)}")
    seconds = sum(cell.seconds.reference for cell in report.cells if cell.seconds)
    timed = any(cell.seconds and cell.seconds.candidate is not None for cell in report.cells)
    below = "; those of the candidate are below" if timed else ""
    lines.add_row("reference", f"{seconds:.1f} seconds in all{below}")
    console.print(lines)
    console.print()


def _new_tokens(report: Report) -> str:
    batches = sorted({(cell.batch_size, cell.batching) for cell in report.cells if cell.batch_size is not None})
    if not batches:
        return f"at most {report.max_new_tokens} new tokens each"
    rows = " or ".join(
        f"{size} at a time{'' if batching == 'static' else f' in {batching} batches'}" for size, batching in batches
    )
    return f"{report.max_new_tokens} new tokens each, {rows}"


def _table(cells: Sequence[Cell]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("runtime", "cache", "verdict"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens", "noise (bound)", "worst (bound)", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(cell.runtime, cell.cache, f"[{COLOURS[cell.verdict]}]{cell.verdict}[/]", *_figures(cell))
    return table


def _figures(cell: Cell) -> tuple[str, ...]:
    if cell.tokens is None:
        return ()
    tokens = f"{cell.tokens.equal}/{cell.tokens.compared}"
    seconds = "" if cell.seconds is None or cell.seconds.candidate is None else f"{cell.seconds.candidate:.1f}"
    noise = cell.noise_ratio
    if noise is None:
        return tokens, "", "", seconds
    return (
        tokens,
        f"{figure(noise.logits)} ({figure(noise.bound)})",
        f"{figure(noise.worst_position.ratio)} ({figure(noise.position_bound)})",
        seconds,
    )


def _print_details(cell: Cell, console: Console) -> None:
    name = _name(cell, ", cache ") + ": "
    lines = []
    if cell.reason:
        lines.append(cell.reason)
    if cell.tokens and cell.tokens.first_mismatch:
        first = cell.tokens.first_mismatch
        lines.append(
            f"first mismatch in row {first.row} at step {first.step}: expected token {first.expected}, found "
            f"{first.actual}, "
            f"which the reference gives {figure(first.margin)} less"
        )
    if cell.explained_by is not None:
        lines.append(f"{cell.verdict} explained by {cell.explained_by}: held against that, the same run is equal")
    if cell.also:
        lines.append(_also(cell.also))
    lines += _recorded(cell)
    if cell.noise_ratio and cell.noise_ratio.cache:
        point, ratio = max(cell.noise_ratio.cache.items(), key=lambda item: item[1])
        lines.append(f"of the cache, {point} is noisiest: {figure(ratio)}")
        if cell.verdict != "mismatch" and _strays_in_cache_alone(cell):
            beyond = f"the logits are right, but {len(cell.noise_ratio.cache_beyond)} of {len(cell.noise_ratio.cache)} "
            if cell.cache == "on":
                lines.append(f"{beyond}keys and values of its layers are further off than {cell.expect} explains")
            else:
                wrong = "present.* outputs are not what this checkpoint keeps; whoever decodes with them goes wrong"
                lines.append(f"{beyond}{wrong}")
    lines += _process(cell)
    for line in lines:
        console.print(escape(name + line), soft_wrap=True, highlight=False)


def _also(judged: Judgement) -> str:
    """The judgement that did not make the verdict."""
    whose = "the export's own weights" if judged.weights == "export" else "the checkpoint's weights"
    noise = judged.noise_ratio
    return (
        f"on {whose}: {judged.verdict}, {judged.tokens.equal}/{judged.tokens.compared} tokens, noise ratio "
        f"{figure(noise.logits)} (bound {figure(noise.bound)})"
    )


def _recorded(cell: Cell) -> list[str]:
    """What another system's record adds: where its tokens rank, and how far its log-probabilities are off."""
    lines = []
    if cell.differences:
        worst = max(cell.differences, key=lambda each: each.rank)
        lines.append(
            f"tokens that are not the reference's choice: {len(cell.differences)}; the furthest is its rank "
            f"{worst.rank}, token {worst.actual} in row {worst.row} at step {worst.step}"
        )
    if cell.logprobs:
        nats = cell.logprobs
        lines.append(f"{nats.compared} logprobs are {nats.rms:.2g} nats off (rms), at most {nats.largest:.2g}")
    return lines


def _process(cell: Cell) -> list[str]:
    """What a candidate's process did besides: who ran how many nodes, its memory, and what it wrote."""
    effective = cell.settings.get("effective", {})
    did = [
        f"{name} ran {said['nodes']} nodes" for name, said in effective.get("providers", {}).items() if said["nodes"]
    ]
    if effective.get("session"):
        did.append(f"with {', '.join(f'{name}={value}' for name, value in effective['session'].items())}")
    if cell.peak_memory_bytes is not None:
        did.append(f"at most {cell.peak_memory_bytes / 1e9:.2f} GB in memory")
    lines = [", ".join(did)] if did else []
    if cell.output:
        lines.append(f"the last line that it wrote: {cell.output[-1]}")
    return lines
