"""A real server, llama-cpp-python's own, on the loopback address: judged against the checkpoint that it was made of.

It takes prompts as text alone and names tokens by their strings, the hardest case.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from refengine.errors import InputError
from tests.verify.commands import verify
from tests.verify.comparing import Compared
from tests.verify.llama_server import llama_cpp_server, write_tiny_gguf
from tests.verify.scripted_server import NEW, judged
from verify.candidates.openai_options import KEY_VARIABLE

pytestmark = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python has a test run of its own")
FLOAT32_CACHE = {"type_k": 0, "type_v": 0}  # by number, as ggml has them; float16 where it is not said


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("served") / "tiny.gguf", tiny)


@pytest.fixture(scope="module")
def exact(model) -> Iterator[str]:
    with llama_cpp_server(model, model_alias="tiny", **FLOAT32_CACHE) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def in_float16(model) -> Iterator[str]:
    """With a cache in float16, a key, and room for few tokens."""
    with llama_cpp_server(model, api_key="Sesame", n_ctx=256) as base_url:
        yield base_url


@pytest.fixture(autouse=True)
def no_key(monkeypatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_in_float32_it_is_equal_in_tokens_and_logprobs(compared, exact):
    report = judged(compared, exact)
    (cell,) = report.cells
    assert (cell.verdict, cell.tokens.compared) == ("equal", len(compared.prompts) * NEW)
    assert 0 < cell.noise_ratio.logits <= cell.noise_ratio.bound
    effective = cell.settings["effective"]
    assert (effective["model"], effective["server"], effective["prompts"]) == ("tiny", "uvicorn", "text")
    assert (effective["requests"], effective["retries"]) == (len(compared.prompts) + 2, 0)  # ids were refused once


def test_with_a_cache_in_float16_it_drifts(alone, in_float16):
    (cell,) = judged(alone, in_float16, api_key="Sesame").cells
    assert cell.verdict == "drift"
    assert cell.noise_ratio.logits > 10 * cell.noise_ratio.bound


def test_a_prompt_that_it_has_no_room_for_is_no_verdict_in_its_own_words(compared, in_float16):
    long = Compared(compared.checkpoint, [compared.prompts[2] * 60], NEW)
    report = judged(long, in_float16, api_key="Sesame")
    assert report.exit_code == 3
    assert "maximum context length is 256 tokens" in report.cells[0].reason


def test_without_its_key_it_lets_nobody_in(compared, in_float16):
    with pytest.raises(InputError, match=r"expected to be let in, found status 401, .*give api_key, or set OPENAI_API"):
        judged(compared, in_float16)


def test_without_logprobs_its_tokens_cannot_be_known(compared, exact):
    report = judged(compared, exact, logprobs=0)
    assert report.exit_code == 3
    assert "found text alone" in report.cells[0].reason


def test_another_model_is_found_out(compared, model, tmp_path):
    changed = write_tiny_gguf(tmp_path / "changed.gguf", compared.checkpoint, llama__rope__freq_base=20000.0)
    with llama_cpp_server(changed, **FLOAT32_CACHE) as base_url:
        assert judged(compared, base_url).verdict in ("drift", "mismatch")


def test_the_command_line_asks_it_with_text(tiny, exact):
    asked = ("--runtime", "openai", "--provider-option", f"base_url={exact}", "--prompt", "Today is a good day")
    done = verify("compare", tiny.path, *asked, "--prompt", "Return", "--max-new-tokens", NEW)
    assert (done.code, done.err) == (0, "")
    assert done.first_lines[0] == (
        f"equal: all {2 * NEW} tokens of 1 run are the checkpoint's, and the logprobs are honest float32"
    )
    assert f"{exact} (tiny by uvicorn)" in " ".join(done.out.split())
    assert "note: openai: 4 requests, 0 of them retries" in done.out
