"""`python -m verify bench` from its options to its table."""

import argparse
import operator
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.errors import InputError
from refengine.machine import measure_machine
from refengine.quant import scheme_named
from refengine.requests import check_request
from verify.bench.caches import study_caches
from verify.bench.plot import check_plot, write_cache_plot, write_plot
from verify.bench.positions import prepare_curves
from verify.bench.rounds import measure
from verify.bench.strategies import PROMPT_LENGTH, Task, strategies_of_all, strategies_of_reference
from verify.embedded import embedded_model
from verify.export import export_decoder
from verify.files import check_place, replacing
from verify.machine import machine
from verify.report.bench import Benchmark, Curve, Machine
from verify.report.bench_as_json import as_json
from verify.report.bench_console import print_benchmark
from verify.report.caches import CacheStudy
from verify.report.caches_console import print_caches
from verify.runtimes import USUAL
from verify.workers.worker import Worker

EVERY_SCHEME = "all"
QUANTISED = ("int8",)  # the schemes measured unless others are asked for
Begin = Callable[[str], None]  # told what is done next


def run_bench(options: argparse.Namespace) -> int:
    """Measures, prints the table, writes what was asked for, and returns the exit code."""
    json_file = Path(options.json) if options.json not in (None, "-") else None
    for place in (json_file, *options.plot):
        if place is not None:
            check_place(place)  # now, not after minutes of work
    for plot in options.plot:
        check_plot(plot)
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        checkpoint = open_checkpoint(options.model or embedded_model())
        found: Benchmark | CacheStudy
        if EVERY_SCHEME in (options.kv_cache or ()):
            found = _caches_studied(options, checkpoint)
        else:
            found = _measured(options, checkpoint, _candidate(options, checkpoint, Path(temporary)))
    try:
        _show(found, as_text=options.json != "-")
    finally:  # files are written even when the reader of a pipe has gone
        _write(found, options.plot, json_file)
    return 0


def _write(found: Benchmark | CacheStudy, plots: Sequence[Path], json_file: Path | None) -> None:
    for plot in plots:
        with replacing(plot) as unfinished:
            if isinstance(found, CacheStudy):
                write_cache_plot(found, unfinished, plot.suffix)
            else:
                write_plot(found, unfinished, plot.suffix)
    if json_file is not None:
        with replacing(json_file) as unfinished:
            unfinished.write_text(as_json(found), encoding="utf-8")


def _caches_studied(options: argparse.Namespace, checkpoint: Checkpoint) -> CacheStudy:
    if options.candidate or options.runtime or len(options.kv_cache) > 1:
        raise InputError(
            f"--kv-cache {EVERY_SCHEME}: measures every scheme on the reference engine; "
            "leave out CANDIDATE, --runtime and other schemes"
        )
    with _progress(2) as begin:
        return study_caches(checkpoint, begin)


def _candidate(options: argparse.Namespace, checkpoint: Checkpoint, directory: Path) -> Path | None:
    """The export to measure: the one given, the embedded model's made on the spot, or none for a model alone."""
    if options.candidate is not None:
        if not options.candidate.exists():  # all else that is wrong with it is for each runtime to say
            raise InputError(f"{options.candidate}: no such file or directory; expected an export")
        return options.candidate
    if options.model is None:
        export_decoder(checkpoint, directory / "model.onnx")
        return directory / "model.onnx"
    if options.runtime:
        raise InputError(
            "--runtime: expected MODEL and CANDIDATE, or neither, found MODEL alone; give an export to run"
        )
    return None


def _measured(options: argparse.Namespace, checkpoint: Checkpoint, candidate: Path | None) -> Benchmark:
    tasks = _tasks(options, checkpoint, candidate)
    check_request(checkpoint.config, [0] * PROMPT_LENGTH, options.max_new_tokens, name="--max-new-tokens")
    with _progress(2 + len(tasks) if options.plot else 1 + len(tasks)) as begin:
        begin("what this machine reads and computes")
        rates = measure_machine()
        curves: list[Curve] = []
        if options.plot:
            begin("time per token against position")
            with Worker(prepare_curves, checkpoint.path) as worker:
                curves = worker.call(operator.call)
        rows = measure(tasks, rates, lambda task: begin(f"{task.engine}: {task.strategy.name}"))
    return Benchmark(
        Machine(machine(), rates.bandwidth, rates.flops),
        str(checkpoint.path),
        checkpoint.config.model_type,
        str(candidate) if candidate else None,
        PROMPT_LENGTH,
        options.max_new_tokens,
        rows,
        curves,
    )


def _tasks(options: argparse.Namespace, checkpoint: Checkpoint, candidate: Path | None) -> list[Task]:
    schemes = list(dict.fromkeys(options.kv_cache or QUANTISED))
    for scheme in schemes:
        scheme_named(scheme)
    asked = checkpoint.path, checkpoint.config, options.max_new_tokens
    tasks = [Task(strategy, *asked) for strategy in strategies_of_reference(options.batch_size, schemes)]
    for runtime in dict.fromkeys(options.runtime or USUAL) if candidate else ():
        tasks += [Task(strategy, *asked, runtime, candidate) for strategy in strategies_of_all(options.batch_size)]
    return tasks


def _show(found: Benchmark | CacheStudy, as_text: bool) -> None:
    """The table on standard output, or there the JSON and the table on standard error."""
    console = Console(stderr=not as_text, highlight=False)
    with console.capture() as captured:
        if isinstance(found, CacheStudy):
            print_caches(found, console)
        else:
            print_benchmark(found, console)
    # Written here and not by the console, which would end the process with 1 when the reader of a pipe has gone.
    print(captured.get(), end="", flush=True, file=sys.stdout if as_text else sys.stderr)
    if not as_text:
        print(as_json(found), end="", flush=True)


@contextmanager
def _progress(steps: int) -> Iterator[Begin]:
    """A bar on standard error, of what has been done and what is being done; nothing when nobody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=steps, completed=-1)

        def begin(what: str) -> None:
            bars.update(bar, description=what, advance=1)

        yield begin
