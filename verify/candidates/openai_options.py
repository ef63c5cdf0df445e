"""How to ask an OpenAI-compatible server, from `--provider-option`."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from refengine.errors import InputError

KEY_VARIABLE = "OPENAI_API_KEY"
KNOWN = ("base_url", "model", "api_key", "logprobs", "timeout", "retries", "max_requests")


@dataclass(frozen=True)
class ServerOptions:
    """How to ask a server.

    Attributes:
        base_url: up to where `/completions` follows; usually ends in `/v1`.
        model: as the server calls it; None: the first that it lists.
        api_key: sent with every request, and shown nowhere.
        logprobs: of how many tokens at each step; 0: none.
        timeout: seconds that the server may be silent.
        retries: of one request, of a server that is busy, silent or gone.
        max_requests: in all, retries included.
    """

    base_url: str
    model: str | None = None
    api_key: str | None = None
    logprobs: int = 5
    timeout: float = 300.0
    retries: int = 3
    max_requests: int = 1000

    @classmethod
    def of(cls, given: Mapping[str, str]) -> "ServerOptions":
        """From `--provider-option`; the key from the environment where it is not given. Raises InputError."""
        unknown = next((name for name in given if name not in KNOWN), None)
        if unknown is not None:
            raise InputError(f"--provider-option {unknown}: not known to openai; known are {', '.join(KNOWN)}")
        key = given.get("api_key") or os.environ.get(KEY_VARIABLE)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise InputError(f"api_key: expected printable ASCII, found something else; mind what {KEY_VARIABLE} holds")
        return cls(
            _base_url(given.get("base_url")),
            given.get("model"),
            key,
            int(_number(given, "logprobs", cls.logprobs, whole=True)),
            _number(given, "timeout", cls.timeout, least=0.001),
            int(_number(given, "retries", cls.retries, whole=True)),
            int(_number(given, "max_requests", cls.max_requests, whole=True, least=1)),
        )


def _base_url(given: str | None) -> str:
    if given is None:
        raise InputError("--runtime openai: expected --provider-option base_url=http://HOST:PORT/v1, found none")
    try:
        parts = urlsplit(given)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right or parts.query or parts.fragment:
        raise InputError(f"base_url: expected http://HOST:PORT/v1 or the like, found {given!r}")
    if parts.username or parts.password:
        raise InputError("base_url: found a user name or password in it, which a report would show; give api_key")
    return given.rstrip("/")


def _number(given: Mapping[str, str], name: str, default: float, whole: bool = False, least: float = 0) -> float:
    text = given.get(name, str(default))
    try:
        value = float(int(text) if whole else float(text))
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{name}: expected {kind} from {least:g}, found {text!r}")
    return value
