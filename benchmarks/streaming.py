"""Peak memory of a checkpoint of Llama-3.2-1B's shape, streamed layer by layer and, as its peer, kept in memory.

    python -m benchmarks.streaming [--directory DIRECTORY] [--layers LAYERS]

Writes 2.5 GB of random bfloat16 weights (kept and used again with --directory, temporary without), then lets a
process of its own compute the teacher-forced logits of 128 tokens in float32. What counts is *anonymous* memory,
`RssAnon` of /proc/PID/status: the pages of mapped files, which the kernel drops when it needs them, are not in it.
`VmHWM` and getrusage keep a peak without being asked, but count those pages too; so this process reads
the other's RssAnon every two milliseconds. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from refengine import Weights, open_checkpoint
from refengine.config import Config
from refengine.generate import new_cache, teacher_forced
from refengine.weights import expected_shapes

# Source: config.json of meta-llama/Llama-3.2-1B
LLAMA_3_2_1B: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "eos_token_id": 128001,
    "bos_token_id": 128000,
    "dtype": "bfloat16",
}
TOKENS = 128
SCALE = 0.02  # of the random weights, as models are initialised; activations stay finite
PIECE = 2**24  # numbers drawn at a time
EVERY = 0.002  # seconds


@dataclass(frozen=True)
class Measured:
    """Seconds from opening the checkpoint to the last logits, and the process's peak anonymous memory in bytes."""

    seconds: float
    peak_bytes: int


def main(config: Mapping[str, Any] = LLAMA_3_2_1B, directory: Path | None = None) -> None:
    """Prints what streaming and keeping take, and their ratio."""
    from benchmarks.peers import machine  # here, so that the measured processes do not load what it compares

    with tempfile.TemporaryDirectory(prefix="streaming-") as temporary:
        checkpoint = directory or Path(temporary)
        if not (checkpoint / "config.json").is_file():
            write_checkpoint(checkpoint, config)
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        streamed, resident = (measure(checkpoint, how) for how in ("streamed", "resident"))
    print(machine())
    print(f"{size / 1e9:.2f} GB of weights in bfloat16, {TOKENS} tokens, float32")
    for how, measured in (("streamed", streamed), ("resident", resident)):
        print(f"{how}: peak anonymous memory {measured.peak_bytes / 1e9:.3f} GB, {measured.seconds:.1f} s")
    print(f"ratio {resident.peak_bytes / streamed.peak_bytes:.1f}")


def write_checkpoint(path: Path, config: Mapping[str, Any]) -> None:
    """Random bfloat16 weights for a configuration, a shard for each layer, so that no more than one is in memory."""
    shapes = dict(expected_shapes(Config.from_dict(config)))
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    random = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    for file, names in shards.items():
        save_file({name: random_weights(random, shapes[name]) for name in names}, path / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")  # last: it marks a whole checkpoint


def random_weights(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor: ones for a norm, else normal numbers."""
    weights = np.ones(shape, ml_dtypes.bfloat16)
    flat = weights.reshape(-1)
    for start in range(0, flat.size if len(shape) > 1 else 0, PIECE):
        piece = flat[start : start + PIECE]
        piece[:] = SCALE * random.standard_normal(piece.size, np.float32)
    return weights


def measure(checkpoint: Path, how: str) -> Measured:
    """Runs `compute` in a process of its own and watches its memory."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--directory", str(checkpoint), "--compute", how]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(EVERY)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: failed with exit code {process.returncode}")
    return Measured(float(said), peak)


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process at this moment; 0 when it has just ended."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def compute(checkpoint: Path, how: str) -> float:
    """Seconds to open a checkpoint and compute the logits of random tokens.

    Args:
        checkpoint: its directory.
        how: "streamed" or "resident".
    """
    began = time.perf_counter()
    weights = Weights.open(open_checkpoint(checkpoint), resident=how == "resident")
    token_ids_1T = np.random.default_rng(0).integers(0, weights.config.vocab_size, (1, TOKENS))
    positions_1T = np.arange(TOKENS)[None]
    for _, logits_1TV in teacher_forced(weights, token_ids_1T, positions_1T, new_cache(weights, 1)):
        if not np.isfinite(logits_1TV).all():
            raise SystemExit(f"{checkpoint}: expected finite logits, found others; the weights are too large")
    return time.perf_counter() - began


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description="Peak memory, streamed.")
    parser.add_argument("--directory", type=Path, help="where the checkpoint is, or is to be written and kept")
    parser.add_argument("--layers", type=int, default=LLAMA_3_2_1B["num_hidden_layers"], help="default: %(default)s")
    parser.add_argument("--compute", choices=["streamed", "resident"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    options = _options()
    if options.compute:
        print(compute(options.directory, options.compute))
    else:
        main({**LLAMA_3_2_1B, "num_hidden_layers": options.layers}, options.directory)
