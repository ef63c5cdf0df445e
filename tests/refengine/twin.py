"""A second forward pass, one loop at a time, to hold the engine's against.

Nothing here is shared with `refengine` but the configuration's field names, and nothing is fast: every number
is a Python float (IEEE double), every axis a `for`. It was written from the papers and from the definition in
transformers 5.23.0 (`models/llama/modeling_llama.py`, `models/mistral/modeling_mistral.py`,
`modeling_rope_utils.py`), without looking at the engine.

Source: Touvron et al. 2023 (arXiv:2302.13971), section 2.2; Zhang and Sennrich 2019 (arXiv:1910.07467),
equation 4; Su et al. 2021 (arXiv:2104.09864), equation 34, in the half-split order; Shazeer 2020
(arXiv:2002.05202), SwiGLU; Ainslie et al. 2023 (arXiv:2305.13245), section 2.2; Jiang et al. 2023
(arXiv:2310.06825), section 2.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from refengine.config import Config, RopeParameters

Vector = list[float]
Matrix = list[Vector]


def twin_logits(
    config: Config,
    tensors: Mapping[str, np.ndarray],
    token_ids_BT: np.ndarray | Sequence[Sequence[int]],
    positions_BT: np.ndarray | Sequence[Sequence[int]],
) -> np.ndarray:
    """Return float64 logits_BTV; rows of padding (position -1) are zeros, for their logits mean nothing.

    `tensors` maps checkpoint names to arrays of any float dtype. There is no cache: every token a query may
    see is in its own row. Tokens may stand in any order in a row; only their positions matter.
    """
    weights = {name: _floats(array) for name, array in tensors.items()}
    positions = [[int(position) for position in row] for row in positions_BT]
    tokens = [[int(token) for token in row] for row in token_ids_BT]
    logits_BTV = np.zeros((len(tokens), len(tokens[0]), config.vocab_size), np.float64)
    for b in range(len(tokens)):
        # Padding takes no part in anything, so a row is computed as if it were not there.
        real = [t for t in range(len(tokens[b])) if positions[b][t] >= 0]
        row_positions = [positions[b][t] for t in real]
        # transformers stretches `dynamic` by the longest row of a batch; here a row is what it is alone.
        frequencies, attention_factor = twin_frequencies(
            config.rope_parameters,
            config.head_dim,
            config.max_position_embeddings,
            max(row_positions, default=-1) + 1,
        )
        hidden = [list(weights["model.embed_tokens.weight"][tokens[b][t]]) for t in real]
        for layer in range(config.num_hidden_layers):
            hidden = _decoder_layer(config, weights, layer, hidden, row_positions, frequencies, attention_factor)
        head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        for t, vector in zip(real, hidden, strict=True):
            final = _rms_norm(vector, weights["model.norm.weight"], config.rms_norm_eps)
            for v in range(config.vocab_size):
                logits_BTV[b, t, v] = _dot(head[v], final)
    return logits_BTV


def twin_frequencies(
    rope: RopeParameters, head_dim: int, max_position_embeddings: int, length: int
) -> tuple[Vector, float]:
    """Return the head_dim/2 inverse frequencies in radians a position, and the factor on cosine and sine."""
    theta = rope.rope_theta
    if rope.rope_type == "dynamic":
        stretch = rope.factor * max(length, max_position_embeddings) / max_position_embeddings - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    plain = [theta ** -(2 * p / head_dim) for p in range(head_dim // 2)]
    if rope.rope_type in ("default", "dynamic"):
        return plain, 1.0
    if rope.rope_type == "linear":
        return [frequency / rope.factor for frequency in plain], 1.0
    if rope.rope_type == "llama3":
        return [_llama3_frequency(rope, frequency) for frequency in plain], 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, head_dim, plain)
    raise AssertionError(f"the twin knows no rope type {rope.rope_type!r}")


def _llama3_frequency(rope: RopeParameters, frequency: float) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength > rope.original_max_position_embeddings / rope.low_freq_factor:
        return frequency / rope.factor
    if wavelength < rope.original_max_position_embeddings / rope.high_freq_factor:
        return frequency
    turns = rope.original_max_position_embeddings / wavelength
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - share) * frequency / rope.factor + share * frequency


def _yarn_frequencies(rope: RopeParameters, head_dim: int, plain: Vector) -> tuple[Vector, float]:
    def dimension_that_turns(times: float) -> float:
        turn = times * 2 * math.pi
        return head_dim * math.log(rope.original_max_position_embeddings / turn) / (2 * math.log(rope.rope_theta))

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    low, high = dimension_that_turns(rope.beta_fast or 32), dimension_that_turns(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    frequencies = []
    for p in range(head_dim // 2):
        interpolated = min(max((p - low) / (high - low), 0.0), 1.0)
        frequencies.append(plain[p] / rope.factor * interpolated + plain[p] * (1.0 - interpolated))
    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return frequencies, magnitude(1.0)


def _decoder_layer(
    config: Config,
    weights: Mapping[str, list],
    layer: int,
    hidden: Matrix,
    positions: Sequence[int],
    frequencies: Vector,
    attention_factor: float,
) -> Matrix:
    def linear(name: str, vector: Vector) -> Vector:
        return _linear(weights, f"model.layers.{layer}.{name}", vector)

    def norm(name: str, vector: Vector) -> Vector:
        return _rms_norm(vector, weights[f"model.layers.{layer}.{name}.weight"], config.rms_norm_eps)

    def rotated(vectors: list[Matrix]) -> list[Matrix]:
        return [
            [_rotate(head, position, frequencies, attention_factor) for head in heads]
            for heads, position in zip(vectors, positions, strict=True)
        ]

    normed = [norm("input_layernorm", vector) for vector in hidden]
    queries = rotated([_heads(linear("self_attn.q_proj", vector), config.head_dim) for vector in normed])
    keys = rotated([_heads(linear("self_attn.k_proj", vector), config.head_dim) for vector in normed])
    values = [_heads(linear("self_attn.v_proj", vector), config.head_dim) for vector in normed]
    after = []
    for t in range(len(hidden)):
        seen = [s for s in range(len(hidden)) if _may_see(positions[t], positions[s], config.sliding_window)]
        mixed: Vector = []
        for n in range(config.num_attention_heads):
            k = n // (config.num_attention_heads // config.num_key_value_heads)
            mixed += _attention(queries[t][n], [keys[s][k] for s in seen], [values[s][k] for s in seen])
        attended = _add(hidden[t], linear("self_attn.o_proj", mixed))
        inner = norm("post_attention_layernorm", attended)
        gate, up = linear("mlp.gate_proj", inner), linear("mlp.up_proj", inner)
        swiglu = [_silu(gate[f]) * up[f] for f in range(config.intermediate_size)]
        after.append(_add(attended, linear("mlp.down_proj", swiglu)))
    return after


def _may_see(query_position: int, key_position: int, window: int | None) -> bool:
    """A query sees itself and what went before; a window of w leaves itself and the w - 1 tokens before."""
    if key_position > query_position:
        return False
    return window is None or key_position > query_position - window


def _attention(query: Vector, keys: Matrix, values: Matrix) -> Vector:
    scores = [_dot(query, key) / math.sqrt(len(query)) for key in keys]
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    total = sum(powers)
    mixed = [0.0] * len(query)
    for power, value in zip(powers, values, strict=True):
        for h in range(len(query)):
            mixed[h] += power / total * value[h]
    return mixed


def _rotate(head: Vector, position: int, frequencies: Vector, attention_factor: float) -> Vector:
    half = len(head) // 2
    turned = list(head)
    for p in range(half):
        cosine = math.cos(position * frequencies[p]) * attention_factor
        sine = math.sin(position * frequencies[p]) * attention_factor
        turned[p] = head[p] * cosine - head[p + half] * sine
        turned[p + half] = head[p + half] * cosine + head[p] * sine
    return turned


def _rms_norm(vector: Vector, weight: Vector, epsilon: float) -> Vector:
    mean_square = sum(x * x for x in vector) / len(vector)
    return [weight[d] * (vector[d] / math.sqrt(mean_square + epsilon)) for d in range(len(vector))]


def _linear(weights: Mapping[str, list], name: str, vector: Vector) -> Vector:
    matrix = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias", [0.0] * len(matrix))
    return [_dot(matrix[row], vector) + bias[row] for row in range(len(matrix))]


def _heads(vector: Vector, head_dim: int) -> Matrix:
    return [vector[start : start + head_dim] for start in range(0, len(vector), head_dim)]


def _dot(left: Vector, right: Vector) -> float:
    total = 0.0
    for i in range(len(right)):
        total += left[i] * right[i]
    return total


def _add(left: Vector, right: Vector) -> Vector:
    return [left[i] + right[i] for i in range(len(right))]


def _silu(x: float) -> float:
    # exp overflows for large positive arguments only, so each sign takes the form that cannot.
    return x / (1.0 + math.exp(-x)) if x >= 0 else x * math.exp(x) / (1.0 + math.exp(x))


def _floats(array: np.ndarray) -> list:
    return np.asarray(array).astype(np.float64).tolist()
