"""The command line: arguments in, exit code out. 0 equal, 1 drift or mismatch, 2 bad usage or input, 3 no verdict."""

import argparse
import sys
from collections.abc import Callable, Sequence

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from verify.errors import NoVerdict
from verify.verbs import options

OK, BAD_INPUT, NO_VERDICT, INTERRUPTED = 0, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; what goes wrong is one line on standard error."""
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
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

    def add(
        verb: str, run: Callable[[argparse.Namespace], int], add_options: Callable[..., None], help_: str
    ) -> argparse.ArgumentParser:
        added = verbs.add_parser(verb, help=help_)
        add_options(added)
        added.set_defaults(run=run)
        return added

    add(
        *("compare", _compare, options.add_compare),
        "prove an export equal to its checkpoint, token for token, or show where it is not",
    )
    check = add(
        *("check", _check, options.add_check),
        "judge what another system decoded by its record: token ids, and logits or logprobs if it has them",
    )
    check.description, check.formatter_class = options.TRACE_FORMATS, argparse.RawDescriptionHelpFormatter
    add(
        *("inspect", _inspect, options.add_inspect),
        "show what an export is, and who runs it, or where it has the checkpoint's tensors",
    )
    add("export", _export, options.add_export, "write a plain ONNX decoder with its cache from a checkpoint")
    add("bench", _bench, options.add_bench, "measure what each way of decoding is worth, on each engine")
    add("causes", _causes, options.add_causes, "list the mistakes that can be named")
    add("explain", _explain, options.add_explain, "show what one of them looks like, and how to put it right")
    return root


def _compare(given: argparse.Namespace) -> int:
    from verify.verbs.run_compare import run_compare

    return run_compare(given)


def _check(given: argparse.Namespace) -> int:
    from verify.check import run_check

    return run_check(given)


def _bench(given: argparse.Namespace) -> int:
    from verify.bench.run import run_bench

    return run_bench(given)


def _causes(given: argparse.Namespace) -> int:
    from verify.verbs.run_causes import run_causes

    return run_causes(given)


def _explain(given: argparse.Namespace) -> int:
    from verify.verbs.run_causes import run_explain

    return run_explain(given)


def _inspect(given: argparse.Namespace) -> int:
    from verify.verbs.run_inspect import run_inspect

    return run_inspect(given)


def _export(given: argparse.Namespace) -> int:
    from verify.export import export_decoder

    export_decoder(open_checkpoint(given.model), given.out)
    print(f"verify: wrote {given.out}", file=sys.stderr)
    return OK
