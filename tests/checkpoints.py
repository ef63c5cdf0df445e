"""Small random checkpoints for tests: all dimensions different, and weights that make every part matter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from refengine.config import Config
from refengine.weights import expected_shapes

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 67,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def write_checkpoint(
    path: Path,
    seed: int = 0,
    dtype: np.typing.DTypeLike = np.float32,
    **config: Any,
) -> Path:
    """Writes config.json and model.safetensors into the directory `path`, made if need be; returns `path`.

    Args:
        path: the checkpoint directory.
        seed: of the random weights.
        dtype: what the weights are stored in (float64, float32, float16 or bfloat16).
        config: keys of config.json that differ from `TINY`.
    """
    given = TINY | config
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    written = json.dumps(given | {"dtype": np.dtype(dtype).name}, indent=1)
    (path / "config.json").write_text(written, encoding="utf-8")
    shapes = dict(expected_shapes(Config.from_dict(given)))
    tensors = {name: _random(rng, name, shape).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    return path


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * values
    if name.endswith(".bias"):
        return 0.3 * values
    if name == "model.embed_tokens.weight":
        return values
    # Outputs of unit size and a little over: scores then spread enough that attention is far from uniform.
    return 1.3 * values / np.sqrt(shape[1])
