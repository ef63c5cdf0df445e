"""What a command says: its report on standard output, its progress on standard error, and JSON where it is wanted."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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

from refengine.errors import InputError
from verify.files import check_place, replacing
from verify.report.as_json import as_json
from verify.report.console import print_report
from verify.report.result import Report

STANDARD_OUTPUT = "-"  # as `--json` takes it


def check_json_place(json: str | None) -> None:
    """Raises InputError when what `--json` names cannot be written: before the work, not after minutes of it."""
    if json not in (None, STANDARD_OUTPUT):
        check_place(Path(json))


def deliver(report: Report, json: str | None) -> None:
    """Shows a report, and writes it as JSON to where `--json` says."""
    deliver_text(lambda console: print_report(report, console), as_json(report), json)


def deliver_text(show: Callable[[Console], None], as_json: str, json: str | None) -> None:
    """Shows what `show` prints, and writes the same as JSON to where `--json` says."""
    try:
        _show(show, as_json, as_text=json != STANDARD_OUTPUT)
    finally:  # the file is written even where standard output cannot be
        if json not in (None, STANDARD_OUTPUT):
            with replacing(Path(json)) as unfinished:
                unfinished.write_text(as_json, encoding="utf-8")


class _PatientConsole(Console):
    """A console whose reader may leave: what is left is not shown, and the exit code is still the verdict's."""

    def on_broken_pipe(self) -> None:
        """Sends the rest nowhere, where the interpreter's last flush cannot fail either."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_text(show: Callable[[Console], None]) -> None:
    """Shows what `show` prints on standard output.

    Raises:
        InputError: it cannot be written there; a reader who has gone is no reason.
    """
    console = _PatientConsole()
    with _writing_to(console):
        show(console)
        console.file.flush()


def _show(show: Callable[[Console], None], as_json: str, as_text: bool) -> None:
    """A report on standard output: as text, or as JSON with the text on standard error."""
    if as_text:
        show_text(show)
        return
    show(Console(stderr=True))
    with _writing_to(_PatientConsole()):
        print(as_json, end="", flush=True)


@contextmanager
def _writing_to(console: _PatientConsole) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        console.on_broken_pipe()
    except OSError as error:
        console.on_broken_pipe()
        raise InputError(f"standard output: could not be written ({error.strerror}); write to another place") from error


class Bars:
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
def progress_bars() -> Iterator[Bars]:
    """Bars for as long as the block runs."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield Bars(bars)
