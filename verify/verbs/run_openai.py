"""`python -m verify compare MODEL --runtime openai`: what a server decodes now, judged as a record of it would be."""

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

from refengine.checkpoint import Checkpoint
from refengine.errors import InputError
from refengine.tokenizer import load_tokenizer
from verify.candidates import Settings
from verify.candidates.openai import Served, ServerOptions, complete
from verify.candidates.token_strings import TokenStrings
from verify.check import after_end_tokens, check_expectation, hidden_from_trace, judge_trace
from verify.compare import Progress
from verify.diagnose_trace import diagnose_trace
from verify.errors import NoVerdict
from verify.expect import Expectation
from verify.files import sha256_of
from verify.report.result import Cell, Exported, Model, Report, Seconds
from verify.runtimes import SERVER
from verify.trace_file import check_trace
from verify.truth.reference import Rows


def check_options(given: argparse.Namespace) -> None:
    """Raises InputError when `compare` is asked for what a server cannot be."""
    if set(given.runtime) != {SERVER}:
        raise InputError(f"--runtime {SERVER}: a server is judged alone, found other runtimes too; leave them out")
    if given.candidate is not None:
        raise InputError(
            f"--runtime {SERVER}: expected MODEL alone, as the server is the candidate; found CANDIDATE too"
        )
    unmet = {
        "--cache": given.cache != "both",
        "--batching": given.batching != "static",
        "--batch-size": given.batch_size is not None,
        "--max-tokens": given.max_tokens is not None,
        "--reference": given.reference is not None,
        "--save-reference": given.save_reference is not None,
        "--python": bool(given.python),
        "--repro": given.repro is not None,
    }
    if names := [name for name, is_given in unmet.items() if is_given]:
        raise InputError(
            f"{', '.join(names)}: a server decodes as it does, asked for one prompt at a time; leave this out with "
            f"--runtime {SERVER}"
        )


def judge_server(
    checkpoint: Checkpoint,
    prompts: Rows,
    max_new_tokens: int,
    provider_options: Mapping[str, str],
    expectation: Expectation | None,
    progress: Progress,
    diagnose_seconds: float | None = None,
) -> Report:
    """The whole report on a server: one cell, without a verdict when the server fails.

    Args:
        provider_options: as `ServerOptions.of` takes them.
        diagnose_seconds: for finding the cause of what is not equal; None where nobody asks for it.

    Raises:
        InputError: the options cannot be right, or the server is one of another model.
    """
    expectation = check_expectation(expectation)
    options = ServerOptions.of(provider_options)
    requested = {name: value for name, value in provider_options.items() if name != "api_key"}
    strings = TokenStrings(lambda: load_tokenizer(checkpoint.path), checkpoint.config.vocab_size)
    progress.begin(f"asking {options.base_url}", len(prompts))
    began = time.perf_counter()
    served, diagnosed = None, None
    begin = partial(progress.begin, steps=None)
    try:
        served = complete(options, prompts, max_new_tokens, strings, lambda: progress.advance(1))
    except NoVerdict as error:
        settings = asdict(Settings(requested))
        cell = Cell(SERVER, "unknown", settings, "no-verdict", None, None, reason=str(error), expect=expectation.name)
    else:
        seconds = time.perf_counter() - began
        check_trace(options.base_url, served.trace, checkpoint.config)
        cell = judge_trace(checkpoint, served.trace, expectation, begin)
        if diagnose_seconds is not None:
            judge = partial(judge_trace, checkpoint, expectation=expectation)
            diagnosed = diagnose_trace(
                *(checkpoint, served.trace, cell, judge), seconds=diagnose_seconds, goes_on=True, on_progress=begin
            )
        settings = asdict(Settings(requested, _effective(served)))
        reference = cell.seconds.reference if cell.seconds else 0.0
        cell = replace(cell, runtime=SERVER, settings=settings, seconds=Seconds(seconds, reference))
    return Report(
        Model(str(checkpoint.path), checkpoint.config.model_type, sha256_of(*checkpoint.files)),
        Exported(options.base_url, _who(served), sha256=""),
        len(prompts),
        max_new_tokens,
        (cell,),
        tuple(_notes(served, max_new_tokens, checkpoint)) if served else (),
        tuple(_hidden(served, checkpoint)) if served else (),
        diagnosed=diagnosed,
    )


def _effective(served: Served) -> dict[str, object]:
    prompts = "text" if served.as_text else "token ids"
    return {
        "model": served.model,
        "server": served.server,
        "prompts": prompts,
        "requests": served.requests,
        "retries": served.retries,
    }


def _who(served: Served | None) -> str:
    if served is None:
        return "a server that did not answer as expected"
    return f"{served.model} by {served.server or 'a server that does not name itself'}"


def _notes(served: Served, max_new_tokens: int, checkpoint: Checkpoint) -> list[str]:
    rows = served.trace.tokens
    notes = [
        f"{SERVER}: {served.requests} requests, {served.retries} of them retries, for one prompt at a time; with "
        "which others the server batched it, and whether it read a cache, is not known"
    ]
    if served.as_text:
        notes.append(
            f"{SERVER}: the server takes no token ids, so prompts were sent as text; of what its own tokenizer made "
            "of them the number of tokens is known, where it gives that"
        )
    if served.cut:
        row, step = served.cut[0]
        notes.append(
            f"{SERVER}: the server gives strings for tokens; {len(served.cut)} of {len(rows)} rows were judged up to "
            f"the first that no one token has, the first of them row {row} up to step {step}"
        )
    cut = {row for row, _ in served.cut}
    short = sum(len(new) < max_new_tokens for row, new in enumerate(rows) if row not in cut)
    if short:
        notes.append(f"{SERVER}: {short} of {len(rows)} rows ended before {max_new_tokens} new tokens")
    return [*notes, *after_end_tokens(served.trace, checkpoint.config)]


def _hidden(served: Served, checkpoint: Checkpoint) -> list[str]:
    hidden = hidden_from_trace(served.trace, checkpoint.config)
    if served.trace.logprobs is not None:
        most = max(len(step) for row in served.trace.logprobs for step in row)
        hidden.append(f"logits: a server does not show them; logprobs of at most {most} tokens a step were compared")
    return hidden
