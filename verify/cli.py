"""The command line: arguments in, exit code out. 0 equal, 1 drift or mismatch, 2 bad usage or input, 3 no verdict."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from refengine.quant import SCHEMES
from verify.errors import NoVerdict
from verify.expect import AUTO, EXACT, expectations
from verify.runtimes import RUNTIMES
from verify.schedule import SCHEDULES

FORMATS = """Holds every token of TRACE against the reference's choice after the same tokens. TRACE is one of:

JSON lines, a row each; logprobs are optional, for each new token pairs of a token id and a natural logarithm:
  {"prompt_token_ids": [40, 41], "token_ids": [7, 8], "logprobs": [[[7, -0.1], [9, -2.4]], [[8, -0.3]]]}
an .npz file, its arrays numbered by row; logits are optional, of shape (new tokens, vocabulary):
  prompt_token_ids_0, token_ids_0, logits_0, prompt_token_ids_1, ...
"""
OK, BAD_INPUT, NO_VERDICT, INTERRUPTED = 0, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; what goes wrong is one line on standard error."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except InputError as error:
        return _fail(error, BAD_INPUT)
    except NoVerdict as error:
        return _fail(error, NO_VERDICT)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has gone; closing quietly is what other commands do.
        sys.stderr.close()
        return OK


def _fail(error: Exception | str, code: int) -> int:
    print(f"verify: {error}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    root = argparse.ArgumentParser(
        prog="python -m verify",
        description="Does an exported language model still compute what its checkpoint says?",
    )
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_compare(
        verbs.add_parser(
            "compare",
            help="prove an export equal to its checkpoint, token for token, or show where it is not",
        )
    )
    _add_check(
        verbs.add_parser(
            "check",
            help="judge what another system decoded by its record: token ids, and logits or logprobs if it has them",
            description=FORMATS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_inspect(
        verbs.add_parser(
            "inspect", help="show what an export is, and who runs it, or where it has the checkpoint's tensors"
        )
    )
    _add_export(verbs.add_parser("export", help="write a plain ONNX decoder with its cache from a checkpoint"))
    _add_bench(verbs.add_parser("bench", help="measure what each way of decoding is worth, on each engine"))
    return root


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.set_defaults(run=_compare)
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
        help=".onnx file or a directory that holds one (default: the embedded model's export)",
    )
    compare.add_argument(
        "--runtime", action="append", choices=sorted(RUNTIMES), help="repeatable; default ort-openvino"
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
        choices=[*expectations(), AUTO],
        default=EXACT.name,
        metavar="PRECISION",
        help="what counts as equal: float32 (default), a quantised cache (int8-kv, ov-u8, ...), or auto",
    )
    compare.add_argument(
        "--no-diagnose", action="store_true", help="do not look for the cause (this release never does)"
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


def _add_decoding(compare: argparse.ArgumentParser) -> None:
    """What is decoded, how far, and in which batches."""
    prompts = compare.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable; default: a built-in set")
    prompts.add_argument(
        "--prompts", type=Path, metavar="FILE", help='one a line, or JSON lines with "text" or "token_ids"'
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


def _add_check(check: argparse.ArgumentParser) -> None:
    check.set_defaults(run=_check)
    check.add_argument("model", metavar="MODEL", help="checkpoint directory, hub name or .gguf file")
    check.add_argument("trace", metavar="TRACE", type=Path, help="what another system decoded, in either format")
    check.add_argument(
        "--expect",
        choices=expectations(),
        default=EXACT.name,
        metavar="PRECISION",
        help="what counts as equal: float32 (default), or a quantised cache (int8-kv, ov-u8, ...)",
    )
    check.add_argument(
        "--json",
        metavar="FILE",
        help='write the report as JSON; "-" is standard output, and takes the place of the console report',
    )


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.set_defaults(run=_inspect)
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
        help=".onnx file or a directory that holds one; beside MODEL also OpenVINO's .xml",
    )
    inspect.add_argument(
        "--runtime", choices=sorted(RUNTIMES), help="without MODEL: open it there too, and show who runs which node"
    )
    inspect.add_argument(
        "--json",
        metavar="FILE",
        help='with MODEL: write the relations as JSON; "-" is standard output, and takes the place of the table',
    )


def _add_export(export: argparse.ArgumentParser) -> None:
    export.set_defaults(run=_export)
    export.add_argument("model", metavar="MODEL", help="checkpoint directory, hub name or .gguf file")
    export.add_argument("out", metavar="OUT.onnx", type=Path)


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.set_defaults(run=_bench)
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
    bench.add_argument("--runtime", action="append", choices=sorted(RUNTIMES), help="repeatable; default all of them")
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def _compare(options: argparse.Namespace) -> int:
    from verify.run_compare import run_compare

    return run_compare(options)


def _check(options: argparse.Namespace) -> int:
    from verify.check import run_check

    return run_check(options)


def _bench(options: argparse.Namespace) -> int:
    from verify.bench.run import run_bench

    return run_bench(options)


def _inspect(options: argparse.Namespace) -> int:
    from verify.run_inspect import run_inspect

    return run_inspect(options)


def _export(options: argparse.Namespace) -> int:
    from verify.export import export_decoder

    export_decoder(open_checkpoint(options.model), options.out)
    print(f"verify: wrote {options.out}", file=sys.stderr)
    return OK
