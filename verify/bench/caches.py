"""Every way of storing a cache on one model: bytes, speed at some positions, and quality on a text."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.errors import InputError
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.quant import CALIBRATED, SCHEMES, ops_for, scheme_for
from refengine.scheme import FLOAT32, Scheme, check_scheme
from refengine.tokenizer import load_tokenizer
from refengine.weights import Weights
from verify.bench.quality import qualities
from verify.bench.text import english_text
from verify.machine import machine
from verify.report.caches import CacheFigures, CacheStudy

POSITIONS = (128, 1024, 4096)
ROUNDS = 5  # of each step's time, after one that does not count
TEXT_TOKENS, ROW_TOKENS, CALIBRATION_TOKENS = 4096, 1024, 512


def study_caches(checkpoint: Checkpoint, begin: Callable[[str], None]) -> CacheStudy:
    """Measures every scheme that can store the model's heads; the text is Python's own help. `begin` is told of steps.

    Raises:
        InputError: the model has no tokenizer, or too short a context.
    """
    weights = Weights.open(checkpoint)
    tokens = load_tokenizer(checkpoint.path)(english_text(), verbose=False)["input_ids"]
    row_tokens = min(ROW_TOKENS, checkpoint.config.max_position_embeddings)
    rows = -(-TEXT_TOKENS // row_tokens)
    text, after = np.array(tokens[: rows * row_tokens]).reshape(rows, row_tokens), tokens[rows * row_tokens :]
    schemes, left_out = _schemes(weights, after[:CALIBRATION_TOKENS])
    begin(f"a text of {text.size} tokens through each cache")
    quality = qualities(weights, schemes, text)
    positions = [position for position in POSITIONS if position < checkpoint.config.max_position_embeddings]
    begin("the speed of each")
    speeds: dict[int, dict[str, float]] = {}
    for position in positions:
        speeds[position], nbytes = _speeds(weights, schemes, position)
    found = [
        CacheFigures(
            name,
            nbytes[name] / positions[-1],
            _by_formula(weights, scheme, positions[-1]) / positions[-1],
            {position: speeds[position][name] for position in positions},
            **vars(quality[name]),
        )
        for name, scheme in schemes.items()
    ]
    return CacheStudy(machine(), str(checkpoint.path), text.size, row_tokens, found, left_out)


def _schemes(weights: Weights, calibration: list[int]) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Those that can store the model's heads, float32 first; and why each of the others cannot."""
    schemes, left_out = {"float32": FLOAT32}, {}
    for name in (*SCHEMES, *CALIBRATED):
        try:
            scheme = scheme_for(name, weights, [calibration])
            check_scheme(weights.config, scheme)
        except InputError as error:
            left_out[name] = str(error)
            continue
        if name != "float64":
            schemes[name] = scheme
    return schemes, left_out


def _speeds(weights: Weights, schemes: Mapping[str, Scheme], position: int) -> tuple[dict[str, float], dict[str, int]]:
    """Tokens a second after so many tokens, the schemes taking turns; and the bytes of the caches before."""
    caches = {name: _filled(weights, scheme, position) for name, scheme in schemes.items()}
    nbytes = {name: cache.nbytes for name, cache in caches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in schemes}
    for round_ in range(ROUNDS + 1):
        for name, cache in caches.items():
            ops, began = ops_for(cache.scheme), time.perf_counter()
            forward(weights, np.array([[0]]), np.array([[position + round_]]), cache, last=True, ops=ops)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1 / statistics.median(taken[1:]) for name, taken in seconds.items()}, nbytes


def _filled(weights: Weights, scheme: Scheme, tokens: int) -> KVCache:
    """A cache of random keys and values: how long a step takes does not depend on what they are."""
    config, random = weights.config, np.random.default_rng(0)
    cache = KVCache(config, 1, scheme)
    shape, positions_1T = (1, config.num_key_value_heads, tokens, config.head_dim), np.arange(tokens)[None]
    for layer in range(config.num_hidden_layers):
        x_1KTH = random.standard_normal(shape).astype(weights.dtype)
        cache.update(layer, x_1KTH, x_1KTH, positions_1T)
    return cache


def _by_formula(weights: Weights, scheme: Scheme, tokens: int) -> int:
    shape: Any = tokens, weights.config.num_key_value_heads, weights.config.head_dim
    return weights.config.num_hidden_layers * (scheme.keys.nbytes(*shape) + scheme.values.nbytes(*shape))
