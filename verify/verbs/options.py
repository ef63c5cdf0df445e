"""The options of each verb."""

import argparse
import math
from pathlib import Path

from refengine.errors import InputError
from refengine.quant import SCHEMES
from verify.expect import EXACT
from verify.machine import total_memory
from verify.runtimes import RUNTIMES, SERVER, USUAL, runtime_named
from verify.schedule import SCHEDULES

TRACE_FORMATS = """Holds every token of TRACE against the reference's choice after the same tokens.
TRACE is one of:

JSON lines, a row each; logprobs are optional, for each new token pairs of a
token id and a natural logarithm:
  {"prompt_token_ids": [40, 41], "token_ids": [7, 8],
   "logprobs": [[[7, -0.1], [9, -2.4]], [[8, -0.3]]]}   (all on one line)
an .npz file, its arrays numbered by row; logits are optional, of shape
(new tokens, vocabulary):
  prompt_token_ids_0, token_ids_0, logits_0, prompt_token_ids_1, ...
"""
RUNTIME_NAMES = f"{', '.join(RUNTIMES)}, or ort:PROVIDER for any other of ONNX Runtime's"


def add_compare(compare: argparse.ArgumentParser) -> None:
    """Those of `compare`."""
    compare.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint directory, hub name or .gguf file (default: the embedded model)",
    )
    compare.add_argument(
        "candidate",
        nargs="?",
        metavar="CANDIDATE",
        type=Path,
        help=".onnx file, OpenVINO's .xml, or a directory that holds one; for transformers and llama.cpp MODEL itself "
        "(default: the embedded model's export)",
    )
    compare.add_argument(
        "--runtime",
        action="append",
        type=_runtime_or_server,
        metavar="RUNTIME",
        help=f"repeatable; {RUNTIME_NAMES}; default ort-openvino. {SERVER}, alone and without CANDIDATE: the server at "
        "--provider-option base_url=http://HOST:PORT/v1",
    )
    compare.add_argument(
        "--provider-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="repeatable; passed to the runtime unchanged",
    )
    compare.add_argument("--cache", choices=("both", "on", "off"), default="both", help="default both")
    _add_decoding(compare)
    compare.add_argument(
        "--expect",
        default=EXACT.name,
        metavar="PRECISION",
        help="what counts as equal: float32 (default); arithmetic (float16, bfloat16, int8-activations, "
        "uint8-activations); the export's own weights (int4-weights, ...); a quantised cache (int8-kv, ov-u8, ...); "
        "several joined, as in bfloat16+ov-u8; or auto: what the export's weights and the runtime's settings say",
    )
    _add_limits(compare)
    _add_diagnosis(compare)
    compare.add_argument(
        "--repro",
        type=Path,
        metavar="DIR",
        help="a new or empty one: write the smallest graph that shows the mistake, what it is fed and what is right, "
        "for a bug report",
    )
    compare.add_argument(
        "--json",
        metavar="FILE",
        help='write the report as JSON; "-" is standard output, and takes the place of the console report',
    )
    reference = compare.add_mutually_exclusive_group()
    reference.add_argument(
        "--save-reference", type=Path, metavar="FILE", help="keep the reference's run, to be used again"
    )
    reference.add_argument("--reference", type=Path, metavar="FILE", help="use a reference run that was kept")


def _add_diagnosis(parser: argparse.ArgumentParser) -> None:
    """Whether causes are looked for, and how long."""
    parser.add_argument("--no-diagnose", action="store_true", help="do not look for the cause of what is not equal")
    parser.add_argument(
        "--diagnose-seconds",
        type=_above_zero,
        default=120.0,
        metavar="SECONDS",
        help="after which no other cause is begun; default 120",
    )


def _add_decoding(compare: argparse.ArgumentParser) -> None:
    """What is decoded, how far, and in which batches."""
    prompts = compare.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable; default: a built-in set")
    prompts.add_argument(
        "--prompts", type=Path, metavar="FILE", help='one a line, or JSON lines with "text" or "token_ids"'
    )
    compare.add_argument(
        "--probe",
        action="store_true",
        help="add prompts that show what the others may hide: one longer than the window, one of a few tokens",
    )
    compare.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default 64")
    compare.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="default: all prompts in one left-padded batch where the export can take it",
    )
    compare.add_argument(
        "--batching",
        choices=SCHEDULES,
        default="static",
        help="who shares a batch: prompts as they come (static), those of like length (dynamic), "
        "or whoever joins and leaves a running one (continuous); default static",
    )
    compare.add_argument(
        "--max-tokens",
        type=_positive,
        metavar="N",
        help="of a dynamic batch: most slots of the cache, rows times the longest of them; default: no limit",
    )


def _add_limits(compare: argparse.ArgumentParser) -> None:
    """What the process of a candidate may take, and where it runs."""
    memory = 0.9 * total_memory() / 1e9
    compare.add_argument(
        "--time-limit",
        type=_positive,
        default=600,
        metavar="SECONDS",
        help="the longest that a candidate may take to open, or for a step; default 600",
    )
    compare.add_argument(
        "--memory-limit",
        type=_above_zero,
        default=memory,
        metavar="GB",
        help=f"the most that a candidate may have in memory; default nine tenths of this machine's: {memory:.3g}",
    )
    compare.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="[RUNTIME=]PATH",
        help="repeatable; the interpreter of another environment, for all runtimes or for one: that of packages "
        "which exclude each other, such as onnxruntime and onnxruntime-openvino",
    )


def add_check(check: argparse.ArgumentParser) -> None:
    """Those of `check`."""
    check.add_argument("model", metavar="MODEL", help="checkpoint directory, hub name or .gguf file")
    check.add_argument("trace", metavar="TRACE", type=Path, help="what another system decoded, in either format")
    check.add_argument(
        "--expect",
        default=EXACT.name,
        metavar="PRECISION",
        help="what counts as equal: float32 (default); float16, bfloat16, int8-activations; a quantised cache "
        "(int8-kv, ov-u8, ...); or several joined, as in bfloat16+ov-u8",
    )
    check.add_argument(
        "--json",
        metavar="FILE",
        help='write the report as JSON; "-" is standard output, and takes the place of the console report',
    )
    _add_diagnosis(check)


def add_inspect(inspect: argparse.ArgumentParser) -> None:
    """Those of `inspect`."""
    inspect.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint directory, hub name or .gguf file: find each of its tensors in the export; the exit code is "
        "then 1 when one is changed, missing or in an order that computes something else, and 0 when all of them "
        "are equal, rounded or quantised",
    )
    inspect.add_argument(
        "candidate",
        metavar="CANDIDATE",
        type=Path,
        help=".onnx file, OpenVINO's .xml, or a directory that holds one",
    )
    inspect.add_argument(
        "--runtime", type=_runtime, metavar="RUNTIME", help="without MODEL: open it there too, and show who runs what"
    )
    inspect.add_argument(
        "--json",
        metavar="FILE",
        help='with MODEL: write the relations as JSON; "-" is standard output, and takes the place of the table',
    )


def add_export(export: argparse.ArgumentParser) -> None:
    """Those of `export`."""
    export.add_argument("model", metavar="MODEL", help="checkpoint directory, hub name or .gguf file")
    export.add_argument("out", metavar="OUT.onnx", type=Path)


def add_causes(causes: argparse.ArgumentParser) -> None:
    """Those of `causes`: none."""


def add_explain(explain: argparse.ArgumentParser) -> None:
    """Those of `explain`."""
    explain.add_argument("cause", metavar="CAUSE", help="its name, as `causes` lists it")


def add_bench(bench: argparse.ArgumentParser) -> None:
    """Those of `bench`."""
    bench.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint directory, hub name or .gguf file (default: the embedded model, and its export)",
    )
    bench.add_argument(
        "candidate",
        nargs="?",
        metavar="CANDIDATE",
        type=Path,
        help="an export that the runtimes open; without it the reference engine alone is measured",
    )
    bench.add_argument(
        "--runtime",
        action="append",
        type=_runtime,
        metavar="RUNTIME",
        help=f"repeatable; {RUNTIME_NAMES}; default {', '.join(USUAL)}",
    )
    bench.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="rows of a batch; default 8")
    bench.add_argument(
        "--max-new-tokens", type=_positive, default=32, metavar="N", help="after prompts of 16 tokens; default 32"
    )
    bench.add_argument(
        "--kv-cache",
        action="append",
        metavar="SCHEME",
        help=f"repeatable; a row for a cache that the reference engine stores so: {', '.join(SCHEMES)}; default int8. "
        "all: bytes, speed and quality of every one of them, in place of the strategies",
    )
    bench.add_argument(
        "--plot",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="repeatable; time per token against its position, drawn as .png or .svg",
    )
    bench.add_argument(
        "--json", metavar="FILE", help='write the figures as JSON; "-" is standard output, in place of the table'
    )


def _runtime(text: str) -> str:
    try:
        runtime_named(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _runtime_or_server(text: str) -> str:
    try:
        return text if text == SERVER else _runtime(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or {SERVER}, without CANDIDATE") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above zero, found {text!r}")
    return value
