"""Work in a process of its own, whose threads and memory are its own, and whose end is not the end of everything."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import psutil

from refengine.errors import InputError
from verify.errors import NoVerdict
from verify.workers.arrays import unpack
from verify.workers.serve import SECRET_BYTES, Refused, Result, Steps

Made = TypeVar("Made")
Returned = TypeVar("Returned")
OnStep = Callable[[int], None]

LOOK_EVERY = 0.1  # seconds: how often a silent process is looked at
LINES_KEPT, BYTES_READ = 20, 65536  # the last of what a process wrote
PACKAGES = ("refengine", "verify")
NEEDED = "its environment needs numpy, ml_dtypes, safetensors, onnx and the runtime"
# The other process runs these very packages, whatever is installed in its environment, and takes the rest from there.
BEGIN = f"""\
import importlib.util, sys
root, port, directory = sys.argv[1:]
for name in {PACKAGES}:
    place = root + "/" + name
    spec = importlib.util.spec_from_file_location(name, place + "/__init__.py", submodule_search_locations=[place])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from verify.workers.serve import serve
serve(int(port), directory)
"""


class WorkerFailed(NoVerdict):
    """A worker could not do its work, or has died. `str(error)` is one line that says why."""


@dataclass(frozen=True)
class Bounds:
    """What a worker may take.

    Attributes:
        seconds: the longest without a sign of life, which is a result or a step; None: any time.
        memory: the most bytes; None: any number.
    """

    seconds: float | None = None
    memory: int | None = None


UNBOUNDED = Bounds()


class Worker(Generic[Made]):
    """Applies functions to what `make(*arguments)` returns, in a fresh process; all are found by import there.

    Used in a `with` block, at whose end the process is gone, whatever it was doing. What it writes to standard output
    and standard error is not shown but kept.

    Args:
        make: called with `arguments` before the first function is applied.
        bounds: beyond which the process is ended.
        python: of the environment that it runs in; by default this one.
    """

    def __init__(
        self,
        make: Callable[..., Made],
        *arguments: object,
        bounds: Bounds = UNBOUNDED,
        python: Path | None = None,
    ):
        self._task = make, arguments
        self._bounds = bounds
        self._python = python
        self.peak_memory: int | None = None

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="verify-worker-", ignore_cleanup_errors=True)
        self._said = Path(self._directory.name, "said")
        with ExitStack() as until_connected, socket.create_server(("127.0.0.1", 0)) as server:
            until_connected.callback(self._directory.cleanup)
            self._process = self._started(server.getsockname()[1])
            until_connected.callback(self._end)
            self._connection = self._accepted(server)
            until_connected.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._end()

    @property
    def is_alive(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

    @property
    def said(self) -> tuple[str, ...]:
        """The last lines that it has written, to standard output or standard error."""
        with self._said.open("rb") as file:
            file.seek(max(0, self._said.stat().st_size - BYTES_READ))
            text = file.read().decode("utf-8", errors="replace")
        return tuple(line.strip() for line in text.splitlines() if line.strip())[-LINES_KEPT:]

    def call(self, function: Callable[..., Returned], *arguments: object, on_step: OnStep | None = None) -> Returned:
        """What `function(made, *arguments)` returned there; the first call waits until it has been made.

        Args:
            on_step: told how many steps more are done; the function is then given an `on_step` too, which it calls.

        Raises:
            InputError: making or calling it raised that.
            WorkerFailed: it raised `NoVerdict`, or the process has died, or was ended beyond its bounds.
        """
        try:
            self._connection.send((function, arguments, on_step is not None))
            while isinstance(answer := self._answer(), Steps):
                if on_step is not None:
                    on_step(answer.count)
        except (EOFError, OSError) as error:
            self._process.wait()
            raise WorkerFailed(self._last_words()) from error
        if isinstance(answer, Refused):
            raise InputError(answer.reason) if answer.is_input else WorkerFailed(answer.reason)
        self.peak_memory = answer.peak_memory
        returned: Returned = unpack(answer.packed)
        return returned

    def _started(self, port: int) -> subprocess.Popen:
        python = str(self._python or sys.executable)
        root = str(Path(__file__).parents[2])
        # Without -P, files of the current directory could stand in for packages.
        command = [python, "-P", "-c", BEGIN, root, str(port), self._directory.name]
        self._secret = secrets.token_hex(SECRET_BYTES // 2).encode()
        with self._said.open("wb") as said:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True
                )
            except OSError as error:
                self._directory.cleanup()
                raise WorkerFailed(
                    f"{python}: cannot be run ({error.strerror}); expected a Python interpreter"
                ) from error
        assert process.stdin is not None
        process.stdin.write(self._secret)
        process.stdin.flush()  # and left open: it closes when this process ends
        return process

    def _accepted(self, server: socket.socket) -> Connection:
        server.settimeout(LOOK_EVERY)
        while True:
            try:
                accepted, _ = server.accept()
                break
            except TimeoutError:
                if not self.is_alive:
                    raise WorkerFailed(self._last_words()) from None
        connection = Connection(accepted.detach())
        deliver_challenge(connection, self._secret)
        answer_challenge(connection, self._secret)
        # What this environment finds its packages by is of no use in another one.
        connection.send(sys.path if self._python is None else [])
        connection.send(self._task)
        return connection

    def _answer(self) -> Steps | Refused | Result:
        began = time.monotonic()
        while True:
            heard = self._connection.poll(LOOK_EVERY)
            self._check_memory()
            if heard:
                answer: Steps | Refused | Result = self._connection.recv()
                return answer
            if not self.is_alive:  # a process that it has forked may keep the connection open
                raise EOFError
            silent = time.monotonic() - began
            if self._bounds.seconds is not None and silent > self._bounds.seconds:
                self._stop(f"nothing was heard of its process for {silent:.0f} seconds, so it was ended")

    def _check_memory(self) -> None:
        memory = self._memory()
        self.peak_memory = max(memory, self.peak_memory or 0)
        if self._bounds.memory is not None and memory > self._bounds.memory:
            limit = f"{self._bounds.memory / 1e9:.3g} GB allowed"
            self._stop(f"its process had {memory / 1e9:.3g} GB in memory, more than the {limit}, so it was ended")

    def _memory(self) -> int:
        try:
            return psutil.Process(self._process.pid).memory_info().rss
        except psutil.NoSuchProcess:
            return 0

    def _stop(self, reason: str) -> None:
        self._kill()
        raise WorkerFailed(self._with_last_line(reason))

    def _last_words(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return self._with_last_line("its process was killed (signal 9), as a system without memory does")
        ended = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
        reason = self._with_last_line(f"its process ended with {ended}")
        return f"{reason}; {NEEDED}" if self._python and "ModuleNotFoundError" in reason else reason

    def _with_last_line(self, reason: str) -> str:
        said = self.said
        return f"{reason}: {said[-1]}" if said else reason

    def _kill(self) -> None:
        """Ends the process and those that it has started."""
        if os.name == "nt":
            self._process.kill()
        else:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _end(self) -> None:
        self._kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._directory.cleanup()
