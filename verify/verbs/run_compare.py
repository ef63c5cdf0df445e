"""`python -m verify compare` from its options to its report."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.errors import InputError
from refengine.prompts import encode_checked, read_prompts
from refengine.requests import Limits, check_request
from refengine.tokenizer import encode_prompt, load_tokenizer
from verify.candidates.checkpoint_file import CheckpointFile
from verify.candidates.files import describe_candidate
from verify.candidates.graph_constants import graph_constants
from verify.candidates.onnx_file import OnnxFile
from verify.candidates.openvino_file import IrFile
from verify.compare import Comparison, Progress, Unequal
from verify.contestant import Contestant, Isolated
from verify.embedded import embedded_model
from verify.errors import NoVerdict
from verify.expect import EXACT, expected
from verify.files import check_place, sha256_of
from verify.find_cause import find_cause
from verify.locating.repro import check_repro_place
from verify.naming.by_settings import named_by_settings
from verify.own_weights import notes_on_weights, read_weights
from verify.prompts import BUILT_IN, check_prompts, probes
from verify.report.result import Cell, Diagnosis, Exported, Model, Report
from verify.request import CacheMode, Request, not_revealed, notes_on, request_for
from verify.runtimes import SERVER
from verify.truth.saved_reference import load_reference, save_reference
from verify.verbs.run_openai import check_options, judge_server
from verify.verbs.terminal import check_json_place, deliver, progress_bars
from verify.weights.exported import ExportedCheckpoint
from verify.workers.worker import Bounds

MODES: Mapping[str, tuple[CacheMode, ...]] = {"both": ("off", "on"), "on": ("on",), "off": ("off",)}


def run_compare(options: argparse.Namespace) -> int:
    """Compares, prints the report, writes what was asked for, and returns the exit code."""
    is_server = SERVER in (options.runtime or ())
    if is_server:
        check_options(options)
    elif options.model is not None and options.candidate is None:
        raise InputError("compare: expected MODEL and CANDIDATE, or neither; found MODEL alone")
    check_json_place(options.json)
    if options.save_reference is not None:
        check_place(options.save_reference)  # now, not after minutes of work
    _check_repro(options)
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        checkpoint = open_checkpoint(options.model or embedded_model())
        if is_server:
            report = _report_on_server(options, checkpoint)
        else:
            report = _report(options, checkpoint, options.candidate or _embedded_export(checkpoint, Path(temporary)))
    deliver(report, options.json)
    return report.exit_code


def _check_repro(options: argparse.Namespace) -> None:
    """Raises InputError when the graph that shows a mistake is asked for and cannot be written."""
    if options.repro is None:
        return
    if options.no_diagnose:
        raise InputError("--repro: what it writes comes of the diagnosis, found --no-diagnose; leave one of them out")
    check_repro_place(options.repro)


def _report(options: argparse.Namespace, checkpoint: Checkpoint, path: Path) -> Report:
    request = _request(options, checkpoint)
    settings = _provider_options(options.provider_option)
    bounds = Bounds(options.time_limit, int(options.memory_limit * 1e9))
    runtimes = options.runtime or ["ort-openvino"]
    pythons = _pythons(options.python, runtimes)
    files = {runtime: describe_candidate(path, runtime) for runtime in runtimes}
    # Of a directory that is a checkpoint and holds an export too, the export is what has weights of its own.
    file = next((each for each in files.values() if not isinstance(each, CheckpointFile)), files[runtimes[0]])
    model = Model(str(checkpoint.path), checkpoint.config.model_type, sha256_of(*checkpoint.files))
    saved = None
    if options.reference is not None:
        saved = load_reference(options.reference, model.sha256, request.prompts, request.max_new_tokens)
    with progress_bars() as progress:
        progress.begin(f"reading the weights of {path.name}", None)
        own, notes = read_weights(checkpoint, file)
        comparison = Comparison(checkpoint, request, progress, saved, own)
        runs = _Runs(options, comparison, checkpoint, file, progress)
        for runtime in runtimes:
            progress.begin(f"opening {path.name} on {runtime}", None)
            place = files[runtime].path
            runs.add(Isolated(place, runtime, settings, checkpoint.config, bounds, pythons.get(runtime)), settings)
        weights = None if own is None else replace(own.report, cost=comparison.references.cost_of_weights())
    if own is not None:
        notes += notes_on_weights(own, request.expectation)
    if options.save_reference is not None and EXACT in comparison.references.made:
        save_reference(options.save_reference, comparison.references.made[EXACT], model.sha256)
    return Report(
        model,
        Exported(str(file.path), file.exporter, file.sha256),
        len(request.prompts),
        request.max_new_tokens,
        tuple(runs.cells),
        tuple(notes + runs.notes),
        tuple(not_revealed(checkpoint.config, request, runs.padded)),
        weights=weights,
        diagnosed=runs.diagnosed or _by_settings(comparison, own),
    )


def _by_settings(comparison: Comparison, own: ExportedCheckpoint | None) -> Diagnosis | None:
    """What explains every run that is not equal, where their settings do."""
    if comparison.explained is None or comparison.unequal is not None:
        return None
    return named_by_settings(comparison.explained, None if own is None else own.stored_as)


@dataclass
class _Runs:
    """What is known of the runtimes that have been compared so far."""

    options: argparse.Namespace
    comparison: Comparison
    checkpoint: Checkpoint
    file: OnnxFile | IrFile | CheckpointFile
    progress: Progress
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    padded: bool = False
    diagnosed: Diagnosis | None = None

    def add(self, isolated: Isolated, settings: Mapping[str, str]) -> None:
        """Compares one more, and looks for the cause where it is the first that is not equal."""
        request = self.comparison.request
        try:
            with isolated as candidate:
                self.cells += self.comparison.cells(candidate)
                self.notes += notes_on(candidate, request)
                self.padded |= request_for(candidate, request).is_padded
                if self.comparison.unequal is not None and self.diagnosed is None and not self.options.no_diagnose:
                    self.diagnosed = self._diagnosed(candidate, self.comparison.unequal)
        except NoVerdict as error:
            self.cells += self.comparison.unopened(isolated.runtime, settings, str(error))

    def _diagnosed(self, candidate: Contestant, unequal: Unequal) -> Diagnosis:
        constants = {}
        if not isinstance(self.file, CheckpointFile):
            constants = graph_constants(self.file.path, self.checkpoint.config)
        try:
            return find_cause(
                *(self.checkpoint, self.comparison.own, candidate, unequal, constants),
                *(self.options.diagnose_seconds, self.progress, self.options.repro),
            )
        except NoVerdict as error:
            why = f"the candidate could not be looked into: {error}"
            return Diagnosis("unexplained", notes=(why,), untried=why)


def _report_on_server(options: argparse.Namespace, checkpoint: Checkpoint) -> Report:
    request = _request(options, checkpoint)
    settings = _provider_options(options.provider_option)
    seconds = None if options.no_diagnose else options.diagnose_seconds
    with progress_bars() as progress:
        return judge_server(
            checkpoint, request.prompts, request.max_new_tokens, settings, request.expectation, progress, seconds
        )


def _request(options: argparse.Namespace, checkpoint: Checkpoint) -> Request:
    prompts = _prompts(options, checkpoint)
    if options.probe:
        prompts = [*prompts, *probes(checkpoint.config, options.max_new_tokens)]
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


def _pythons(given: Sequence[str], runtimes: Sequence[str]) -> dict[str, Path]:
    """Of each runtime that is to run in another environment, the interpreter there."""
    pythons: dict[str, Path] = {}
    for text in given:
        runtime, equals, path = text.partition("=")
        named = [runtime] if equals and runtime in runtimes else runtimes
        python = Path(path if equals and runtime in runtimes else text)
        if not python.is_file():
            if equals and Path(path).is_file():
                raise InputError(
                    f"--python: {runtime!r} is none of the runtimes that are compared ({', '.join(runtimes)}); add "
                    f"--runtime {runtime}, or leave it out"
                )
            raise InputError(f"--python: expected a Python interpreter, as in ENVIRONMENT/bin/python, found {text!r}")
        pythons |= dict.fromkeys(named, python)
    return pythons


def _embedded_export(checkpoint: Checkpoint, directory: Path) -> Path:
    """An export of the embedded model, made on the spot."""
    from verify.export import export_decoder

    out = directory / "model.onnx"
    export_decoder(checkpoint, out)
    return out
