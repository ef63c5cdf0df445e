"""`python -m verify compare` from its options to its report."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.errors import InputError
from refengine.prompts import encode_checked, read_prompts
from refengine.requests import Limits, check_request
from refengine.tokenizer import encode_prompt, load_tokenizer
from verify.candidates.files import describe_candidate
from verify.compare import CacheMode, Comparison, Request, not_revealed, notes_on, request_for
from verify.embedded import embedded_model
from verify.errors import NoVerdict
from verify.expect import EXACT, expected
from verify.files import check_place, replacing, sha256_of
from verify.prompts import BUILT_IN, check_prompts
from verify.reference import load_reference, save_reference
from verify.report.as_json import as_json
from verify.report.console import print_report
from verify.report.result import Cell, Exported, Model, Report
from verify.runtimes import RUNTIMES

MODES: Mapping[str, tuple[CacheMode, ...]] = {"both": ("off", "on"), "on": ("on",), "off": ("off",)}


def run_compare(options: argparse.Namespace) -> int:
    """Compares, prints the report, writes what was asked for, and returns the exit code."""
    if options.model is not None and options.candidate is None:
        raise InputError("compare: expected MODEL and CANDIDATE, or neither; found MODEL alone")
    json_file = Path(options.json) if options.json not in (None, "-") else None
    for place in (json_file, options.save_reference):
        if place is not None:
            check_place(place)  # now, not after minutes of work
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        checkpoint = open_checkpoint(options.model or embedded_model())
        candidate = options.candidate or _embedded_export(checkpoint, Path(temporary))
        report = _report(options, checkpoint, candidate)
    _show(report, as_text=options.json != "-")
    if json_file is not None:
        with replacing(json_file) as unfinished:
            unfinished.write_text(as_json(report), encoding="utf-8")
    return report.exit_code


class _PatientConsole(Console):
    """A console whose reader may leave: what is left is not shown, and the exit code is still the verdict's."""

    def on_broken_pipe(self) -> None:
        """Sends the rest nowhere, where the interpreter's last flush cannot fail either."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(report: Report, as_text: bool) -> None:
    """The report on standard output: as text, or as JSON with the text on standard error."""
    console = _PatientConsole()
    if as_text:
        print_report(report, console)
        return
    print_report(report, Console(stderr=True))
    try:
        print(as_json(report), end="", flush=True)
    except BrokenPipeError:
        console.on_broken_pipe()


def _report(options: argparse.Namespace, checkpoint: Checkpoint, path: Path) -> Report:
    request = _request(options, checkpoint)
    settings = _provider_options(options.provider_option)
    file = describe_candidate(path)
    model = Model(str(checkpoint.path), checkpoint.config.model_type, sha256_of(*checkpoint.files))
    saved = None
    if options.reference is not None:
        saved = load_reference(options.reference, model.sha256, request.prompts, request.max_new_tokens)
    cells: list[Cell] = []
    notes: list[str] = []
    padded = False
    with _progress() as progress:
        comparison = Comparison(checkpoint, request, progress, saved)
        for runtime in options.runtime or ["ort-openvino"]:
            progress.begin(f"opening {path.name} on {runtime}", None)
            try:
                candidate = RUNTIMES[runtime](file.path, runtime, settings, checkpoint.config)
            except NoVerdict as error:
                cells += comparison.unopened(runtime, settings, str(error))
                continue
            cells += comparison.cells(candidate)
            notes += notes_on(candidate, request)
            padded |= request_for(candidate, request).is_padded
    if options.save_reference is not None and EXACT in comparison.reference_runs:
        save_reference(options.save_reference, comparison.reference_runs[EXACT], model.sha256)
    return Report(
        model,
        Exported(str(file.path), file.exporter, file.sha256),
        len(request.prompts),
        request.max_new_tokens,
        tuple(cells),
        tuple(notes),
        tuple(not_revealed(checkpoint.config, request, padded)),
    )


def _request(options: argparse.Namespace, checkpoint: Checkpoint) -> Request:
    prompts = _prompts(options, checkpoint)
    check_prompts(prompts, checkpoint.config, options.max_new_tokens)
    if options.max_tokens is not None:
        if options.batching != "dynamic":
            raise InputError(
                f"--max-tokens: limits dynamic batches alone, found --batching {options.batching}; "
                "add --batching dynamic, or leave it out"
            )
        limits = Limits(max_tokens=options.max_tokens)
        for number, prompt in enumerate(prompts, start=1):
            check_request(checkpoint.config, prompt, options.max_new_tokens, limits, f"prompt {number}")
    expectation = expected(options.expect)
    if expectation is not EXACT and (options.reference or options.save_reference):
        raise InputError("--reference, --save-reference: a run that is kept is exact; leave --expect out")
    return Request(
        prompts,
        options.max_new_tokens,
        MODES[options.cache],
        options.batch_size,
        options.batching,
        options.max_tokens,
        expectation,
    )


def _prompts(options: argparse.Namespace, checkpoint: Checkpoint) -> Sequence[Sequence[int]]:
    @cache
    def tokenizer() -> Any:
        return load_tokenizer(checkpoint.path)  # not needed when every prompt comes as token ids

    def encode(text: str) -> list[int]:
        return encode_prompt(tokenizer(), text, chat=False)

    if options.prompts is not None:
        return read_prompts(options.prompts, encode)
    return [encode_checked("--prompt", text, encode) for text in options.prompt or BUILT_IN]


def _provider_options(given: Sequence[str]) -> dict[str, str]:
    pairs = [option.partition("=") for option in given]
    wrong = next((option for option, (key, equals, _) in zip(given, pairs, strict=True) if not key or not equals), None)
    if wrong is not None:
        raise InputError(f"--provider-option: expected KEY=VALUE, found {wrong!r}")
    return {key: value for key, _, value in pairs}


def _embedded_export(checkpoint: Checkpoint, directory: Path) -> Path:
    """An export of the embedded model, made on the spot."""
    from verify.export import export_decoder

    out = directory / "model.onnx"
    export_decoder(checkpoint, out)
    return out


class _Bars:
    """Progress bars on standard error: one line that is replaced as the work goes on, and nothing when nobody looks."""

    def __init__(self, bars: Progress):
        self.bars = bars
        self.task: TaskID | None = None

    def begin(self, what: str, steps: int | None) -> None:
        """Shows `what` in place of what was shown before."""
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = self.bars.add_task(what, total=steps)

    def advance(self, steps: int) -> None:
        """Moves the bar on."""
        if self.task is not None:
            self.bars.advance(self.task, steps)


@contextmanager
def _progress() -> Iterator[_Bars]:
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _Bars(bars)
