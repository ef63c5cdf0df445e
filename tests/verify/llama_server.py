"""llama-cpp-python's server on the loopback address, and the trained model in a file that it reads."""

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from refengine.checkpoint import Checkpoint
from tests.refengine import gguf_files


def write_tiny_gguf(path: Path, checkpoint: Checkpoint, **changed: Any) -> Path:
    """The trained model with its tokenizer as a GGUF file in float32; `changed` as `write_gguf` takes it."""
    config = checkpoint.config
    tokenizer = json.loads((checkpoint.path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    special = {added["id"] for added in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    metadata = {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if vocabulary[token] in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id[0],
        "tokenizer.ggml.add_bos_token": False,
    }
    weights = {name: checkpoint.tensor(name).astype(np.float32) for name in sorted(checkpoint.names)}
    named = {key.replace(".", "__"): value for key, value in metadata.items()}
    return gguf_files.write_gguf(path, weights, **named | changed)


@contextmanager
def llama_cpp_server(model: Path, **settings: object) -> Iterator[str]:
    """llama-cpp-python's server in a process of its own, for as long as the block runs; its base_url.

    Args:
        settings: of the server, as its command line takes them.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"model": model, "host": "127.0.0.1", "port": port, "n_ctx": 512, "n_threads": 1, **settings}
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "llama_cpp.server", *given]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            _wait_for(port, server)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    import urllib3

    patient = urllib3.Retry(total=60, backoff_factor=0.1, backoff_max=1)
    status = urllib3.request("GET", f"http://127.0.0.1:{port}/v1/models", retries=patient).status
    assert status in (200, 401)  # 401: up, and wants its key
    assert server.poll() is None
