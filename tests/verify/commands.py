"""`python -m verify` called in this process and in others, on a small model whose prompts are token ids."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verify.cli import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def first_lines(self) -> list[str]:
        """The verdict, the cause, and what to do."""
        return self.out.splitlines()[:3]


@dataclass(frozen=True)
class Small:
    """A small checkpoint without a tokenizer, its export, and prompts of token ids."""

    directory: Path

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint"

    @property
    def export(self) -> Path:
        return self.directory / "model.onnx"

    @property
    def prompts(self) -> Path:
        return self.directory / "prompts.jsonl"

    def compare(self, *more: object, candidate: Path | None = None) -> Done:
        """`compare` of a few tokens on ONNX Runtime's CPU provider."""
        quick = ("--runtime", "ort-cpu", "--max-new-tokens", 4, "--prompts", self.prompts)
        return verify("compare", self.checkpoint, candidate or self.export, *quick, *more)


def verify(*arguments: object) -> Done:
    """Runs a command in this process; usage errors end it as they end the program."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def verify_elsewhere(*arguments: object, before: str = "", cwd: Path | None = None) -> Done:
    """Runs a command in a process of its own, after the statement `before`."""
    given = [str(argument) for argument in arguments]
    command = [sys.executable, "-m", "verify", *given]
    if before:
        program = f"import sys; {before}; from verify.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=cwd, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """This one's, with the project to import from, and nothing that says how wide or colourful a terminal is."""
    terminal = ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE")
    return {name: value for name, value in os.environ.items() if name not in terminal} | {"PYTHONPATH": str(ROOT)}


def table_of(lines: Sequence[str]) -> list[str]:
    """The lines of a report's table, its heading first."""
    start = next(place for place, line in enumerate(lines) if line.startswith("runtime "))
    return list(lines[start : start + next(n for n, line in enumerate(lines[start:]) if not line.strip())])
