"""Servers on the loopback address that answer what a test says, and the verdict on one."""

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.verify.comparing import Compared, Notes
from verify.expect import EXACT
from verify.report.result import Report
from verify.verbs.run_openai import judge_server

NEW = 4  # tokens asked for after each prompt


@dataclass(frozen=True)
class Reply:
    """What a server sends: a JSON value or bytes, of which it may leave out the end."""

    content: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_off: int = 0


Answers = Callable[[str, Any], Reply]  # of a path and the JSON that came with it, None without any
MODELS = Reply({"data": [{"id": "tiny"}, {"id": "other"}]})


@dataclass
class Scripted:
    """A server that answers what a test says, and notes what it was asked."""

    base_url: str
    bodies: list[Any] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)


@contextmanager
def scripted_server(reply: Answers) -> Iterator[Scripted]:
    """A server for as long as the block runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: Any) -> None:
            noted.bodies.append(body)
            noted.headers.append(dict(self.headers))
            said = reply(self.path, body)
            content = said.content if isinstance(said.content, bytes) else json.dumps(said.content).encode()
            self.send_response(said.status)
            for name, value in {"Content-Length": str(len(content)), **said.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) - said.cut_off])

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        noted = Scripted(f"http://127.0.0.1:{server.server_port}/v1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield noted
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def silent_server() -> Iterator[str]:
    """A base_url that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def completing(answer: Any) -> Answers:
    """A server that lists models, and completes everything alike."""
    return lambda path, body: MODELS if body is None else answer if isinstance(answer, Reply) else Reply(answer)


def judged(compared: Compared, base_url: str, **options: object) -> Report:
    """The report on a server of some model; without retries where `options` do not say otherwise."""
    given = {"base_url": base_url, "retries": "0", **{name: str(value) for name, value in options.items()}}
    return judge_server(compared.checkpoint, compared.prompts, NEW, given, EXACT, Notes())
