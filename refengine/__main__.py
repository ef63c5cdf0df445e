"""`python -m refengine`: greedy text from one prompt, as it comes, or from many, and what it costs on paper."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refengine.checkpoint import open_checkpoint
from refengine.cost_table import add_cost
from refengine.errors import InputError
from refengine.generate import generate
from refengine.generate_many import POLICIES, generate_many
from refengine.quant import CALIBRATED, SCHEMES, ops_for, scheme_for
from refengine.tokenizer import encode_prompt, load_tokenizer
from refengine.weights import Weights

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 when the input cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except InputError as error:
        print(f"refengine: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("refengine: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe has gone
        return 0


def _parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m refengine", description="A Llama in NumPy.")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = verbs.add_parser("generate", help="greedy text from a prompt")
    run.set_defaults(run=_generate)
    run.add_argument("model", metavar="MODEL", help="checkpoint directory, hub name or .gguf file")
    prompts = run.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument(
        "--prompts", type=Path, metavar="FILE", help='many: one a line, or JSON lines with "text" or "token_ids"'
    )
    run.add_argument("--batching", choices=POLICIES, default="continuous", help="of --prompts; default %(default)s")
    run.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="of --prompts; default %(default)s")
    run.add_argument(
        "--max-tokens", type=_positive, metavar="N", help="of --prompts: most slots of the cache; default: no limit"
    )
    run.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default 64")
    run.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt into the model's chat template, as the user's message",
    )
    run.add_argument(
        "--streamed",
        action="store_true",
        help="read one layer at a time: slower, but memory for one layer is enough",
    )
    run.add_argument(
        "--kv-cache",
        choices=[*SCHEMES, *CALIBRATED],
        default="float32",
        metavar="SCHEME",
        help=f"how the cache is stored: {', '.join(SCHEMES)}; or with scales measured on the prompts: "
        f"{', '.join(CALIBRATED)}; default %(default)s",
    )
    add_cost(verbs)
    return root


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def _generate(options: argparse.Namespace) -> int:
    if options.prompts is not None:
        generate_many(options)
        return 0
    checkpoint = open_checkpoint(options.model)
    tokenizer = load_tokenizer(checkpoint.path)
    prompt = encode_prompt(tokenizer, options.prompt, chat=options.chat)
    weights = Weights.open(checkpoint, resident=not options.streamed)
    scheme = scheme_for(options.kv_cache, weights, [prompt])
    printer = _Printer(tokenizer)
    generate(weights, [prompt], options.max_new_tokens, scheme=scheme, ops=ops_for(scheme), on_token=printer)
    printer.finish()
    return 0


class _Printer:
    """Prints text token by token, and then the speed."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.began = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.printed = ""

    def __call__(self, row: int, token: int) -> None:
        self.times.append(time.perf_counter() - self.began)
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        # A character of several bytes may still lack some: it is printed once it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print(text)

    def _print(self, text: str) -> None:
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text

    def finish(self) -> None:
        """Prints what is left, and the speed: time to the first token, and the rate of those after it."""
        self._print(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        first, last = self.times[0], self.times[-1]
        rate = f"{(len(self.times) - 1) / (last - first):.1f} tokens a second after it, " if len(self.times) > 1 else ""
        print(f"\n[{len(self.tokens)} tokens, {rate}first token after {first:.2f} s]")


if __name__ == "__main__":
    sys.exit(main())
