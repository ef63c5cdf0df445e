"""Work in a process of its own, whose threads and memory are its own, and whose end is not the end of everything."""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from refengine.errors import InputError
from verify.errors import NoVerdict

Result = TypeVar("Result")


class WorkerFailed(NoVerdict):
    """A worker could not do its work, or has died. `str(error)` is one line that says why."""


@dataclass(frozen=True)
class _Refused:
    """What a worker sends in place of a result."""

    reason: str


class Worker(Generic[Result]):
    """Calls what `make(*arguments)` returns, in a fresh process; both must be found by import there.

    Used in a `with` block, at whose end the process is gone, whatever it was doing. What the process writes to standard
    error is not shown; the last line of it is the reason when it dies.
    """

    def __init__(self, make: Callable[..., Callable[[], Result]], *arguments: object):
        self._make = make
        self._arguments = arguments

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="verify-bench-")
        self._errors = Path(self._directory.name, "stderr")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._errors, self._make, self._arguments), daemon=True
        )
        with _without_interrupts():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._directory.cleanup()

    def call(self) -> Result:
        """What the call returned; the first one waits until it has been made.

        Raises:
            WorkerFailed: making or calling it raised, or the process has died.
        """
        try:
            self._connection.send(None)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise WorkerFailed(self._last_words()) from error
        if isinstance(answer, _Refused):
            raise WorkerFailed(answer.reason)
        return answer

    def _last_words(self) -> str:
        code = self._process.exitcode or 0
        ended = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
        said = self._errors.read_text(encoding="utf-8", errors="replace") if self._errors.is_file() else ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return f"its process ended with {ended}" + (f": {lines[-1]}" if lines else "")


def _serve(
    connection: Connection, errors: Path, make: Callable[..., Callable[[], object]], arguments: tuple[object, ...]
) -> None:
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)  # what native code writes too
    try:
        work = make(*arguments)
        while True:
            connection.recv()
            connection.send(work())
    except (InputError, NoVerdict) as error:
        connection.send(_Refused(str(error)))
    except EOFError:  # the other side has ended
        return


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started meanwhile leaves Ctrl-C to the one that starts it, which ends it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
