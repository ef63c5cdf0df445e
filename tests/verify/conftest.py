"""What the tests of verify share: the trained model, prompts of it, and the reference's run of them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.checkpoints import write_checkpoint
from tests.verify.commands import Small
from tests.verify.comparing import Compared
from verify.export import export_decoder

# Runtimes that share no environment with the others: `python -m tests.runtime_environments` runs these tests.
ELSEWHERE = {
    "test_genai.py": "onnxruntime_genai",
    "test_transformers.py": "torch",
    "test_llama_cpp.py": "llama_cpp",
    "test_openai_live.py": "llama_cpp",
}
collect_ignore = [file for file, package in ELSEWHERE.items() if find_spec(package) is None]

TINY_LLAMA = Path(__file__).parents[2] / "fixtures" / "tiny_llama"
# Of different lengths, all but one longer than the shortest window tried, and after other first tokens.
TEXTS = (
    "If the expression is true, the first value is returned; otherwise the second one is, and nothing else",
    "A class definition is an executable statement that usually gives a list of base classes",
    "Return",
)
NEW_TOKENS = 8


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    """The trained model: 12 layers, grouped-query."""
    return open_checkpoint(TINY_LLAMA)


@pytest.fixture(scope="session")
def compared(tiny) -> Compared:
    """A ragged batch of English."""
    tokenizer = load_tokenizer(TINY_LLAMA)
    return Compared(tiny, [encode_prompt(tokenizer, text, chat=False) for text in TEXTS], NEW_TOKENS)


@pytest.fixture(scope="session")
def alone(compared) -> Compared:
    """One prompt, so that nothing is padded."""
    return Compared(compared.checkpoint, compared.prompts[:1], NEW_TOKENS)


@pytest.fixture(scope="session")
def clean(tiny, tmp_path_factory) -> Path:
    """The trained model's own export."""
    path = tmp_path_factory.mktemp("clean") / "model.onnx"
    export_decoder(tiny, path)
    return path


@pytest.fixture(scope="session")
def without_cache(tiny, tmp_path_factory) -> Path:
    """The trained model's export that knows no cache."""
    path = tmp_path_factory.mktemp("without_cache") / "model.onnx"
    export_decoder(tiny, path, cache=False)
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Small:
    """A small random model for the command line: three ragged prompts, no tokenizer."""
    made = Small(tmp_path_factory.mktemp("small"))
    export_decoder(open_checkpoint(write_checkpoint(made.checkpoint)), made.export)
    rows = ([3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9])
    made.prompts.write_text("".join(f'{{"token_ids": {row}}}\n' for row in rows), encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch) -> None:
    """Nothing in the environment says how wide or colourful a terminal is."""
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
