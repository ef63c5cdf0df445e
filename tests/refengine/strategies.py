"""What the properties are drawn from: small configurations, and what they all measure with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refengine.checkpoint import open_checkpoint
from refengine.model import forward
from refengine.weights import Weights
from tests.checkpoints import write_checkpoint

VOCABULARY = 67  # of the tiny model
WINDOW = 5
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "eos_token_id": [3, 14, 15, 35, 58]},
    "mistral": {
        "model_type": "mistral",
        "sliding_window": WINDOW,
        "num_hidden_layers": 2,
        "eos_token_id": [9, 26, 53],
    },
}
KINDS_OF_CACHE = [
    ("llama", None),
    ("mistral", None),
    ("mistral", WINDOW),
]  # a model, and the window that is kept

BOUND = 1e-12  # float64 sums in another order differ by some 1e-15 of the largest logit

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn in detail": {
        "rope_type": "yarn",
        "factor": 6.0,
        "original_max_position_embeddings": 300,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn with its attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a config.json that differ from the tiny model's: either family, every rope type, small."""
    kv_heads = draw(st.integers(1, 3))
    family: dict[str, Any] = {
        "model_type": "llama",
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    if draw(st.booleans()):
        family = {"model_type": "mistral", "sliding_window": draw(st.none() | st.integers(1, 6))}
    return family | {
        "hidden_size": draw(st.integers(3, 11)),
        "intermediate_size": draw(st.integers(1, 13)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(2, 4)),
        "vocab_size": draw(st.integers(5, 20)),
        "max_position_embeddings": draw(st.sampled_from([8, 512])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": None,
        "rope_parameters": {
            "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0])),
            **draw(rope_parameters),
        },
    }


rope_parameters = st.sampled_from(sorted(ROPES)).map(ROPES.__getitem__)


@st.composite
def padded_positions(draw: st.DrawFn, rows: int, most: int = 9) -> np.ndarray:
    """`positions_BT` of rows that start anywhere up to 60, with padding before, behind and in between."""
    real_BT = np.array(
        draw(st.lists(st.lists(st.booleans(), min_size=most, max_size=most), min_size=rows, max_size=rows))
    )
    first_B = np.array(draw(st.lists(st.integers(0, 60), min_size=rows, max_size=rows)))
    return np.where(real_BT, first_B[:, None] + np.cumsum(real_BT, axis=1) - 1, -1)


def written(directory: Path, seed: int = 0, **config: Any) -> Path:
    """A checkpoint in float64, so that casting loses nothing."""
    return write_checkpoint(directory, seed=seed, dtype=np.float64, **config)


def opened(directory: Path, dtype: np.typing.DTypeLike = np.float64, resident: bool = True) -> Weights:
    """Its weights."""
    return Weights.open(open_checkpoint(directory), dtype=dtype, resident=resident)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected| / max |expected|; inf where shapes or dtypes differ or one is not finite."""
    if found.shape != expected.shape or found.dtype != expected.dtype or not np.isfinite(found).all():
        return np.inf
    return float(
        np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), np.finfo(np.float64).tiny)
    )


def one_shot(weights: Weights, tokens: Sequence[int]) -> np.ndarray:
    """Logits of one row in one pass: no cache, no padding, no neighbours."""
    return forward(weights, np.array([tokens]), np.arange(len(tokens))[None])[0]


Prompts = list[list[int]]
prompts = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=16), min_size=1, max_size=4)
