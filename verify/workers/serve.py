"""The side of a worker that works: it makes something once, and then applies to it what it is sent."""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Client, Connection
from pathlib import Path

from refengine.errors import InputError
from verify.errors import NoVerdict
from verify.machine import peak_memory
from verify.workers.arrays import Packed, pack

SECRET_BYTES = 64


@dataclass(frozen=True)
class Steps:
    """Sent while a call goes on: so many steps more are done."""

    count: int


@dataclass(frozen=True)
class Refused:
    """Sent in place of a result: an error that is meant to be read, and whether the input is to blame."""

    reason: str
    is_input: bool


@dataclass(frozen=True)
class Result:
    """What a call returned, and the most bytes that the process has had in memory."""

    packed: Packed
    peak_memory: int | None


def serve(port: int, directory: str) -> None:
    """Connects to who started this process, and works until that goes away.

    Args:
        port: on the loopback address; the secret that opens it is what standard input begins with.
        directory: of the worker, for the arrays that are handed over.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for who started this process, and ends it
    secret = os.read(0, SECRET_BYTES)
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    with Client(("127.0.0.1", port), authkey=secret) as connection:
        try:
            _work(connection, Path(directory))
        except EOFError:  # the other side has ended
            return


def _end_with_the_other() -> None:
    """Ends this process, whatever it is doing, when standard input closes: the other side has ended, however it did."""
    # Not through sys.stdin, whose lock a process forked meanwhile would wait for without end.
    while os.read(0, 1):
        pass
    os._exit(1)


def _work(connection: Connection, directory: Path) -> None:
    sys.path[:] = connection.recv() or sys.path
    make, arguments = connection.recv()
    made, is_made = None, False
    for number in itertools.count():
        function, given, has_steps = connection.recv()
        if has_steps:
            function = partial(function, on_step=lambda count: connection.send(Steps(count)))
        try:
            if not is_made:
                made, is_made = make(*arguments), True
            answer: object = _result(function, made, given, directory / f"result-{number}")
        except (InputError, NoVerdict) as error:
            answer = Refused(str(error), isinstance(error, InputError))
        connection.send(answer)


def _result(function: Callable[..., object], made: object, given: tuple[object, ...], file: Path) -> Result:
    return Result(pack(function(made, *given), file), peak_memory())
