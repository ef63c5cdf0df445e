"""What the proofs of rewrites share: runs to draw, each row alone to compare with, and the noise of float32."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refengine.generate import generate
from refengine.model import forward
from refengine.tokens import left_padded
from refengine.weights import Weights
from tests.refengine.strategies import Prompts, configs, one_shot, opened, relative_error, written
from verify.truth.noise import Noise, orders_for, rms

TRAINED = Path(__file__).parents[2] / "fixtures" / "tiny_llama"
Step = Callable[[np.ndarray, np.ndarray], np.ndarray]  # new token ids and positions -> their logits


@dataclass(frozen=True)
class Run:
    """A model, rows of tokens batched with padding anywhere, and consecutive slices of columns to feed them in."""

    weights: Weights
    rows: Prompts
    token_ids_BT: np.ndarray
    positions_BT: np.ndarray
    chunks: list[slice]

    def fed(self, step: Step) -> np.ndarray:
        """What a step gives for each chunk, side by side."""
        return np.concatenate(
            [step(self.token_ids_BT[:, new], self.positions_BT[:, new]) for new in self.chunks], axis=1
        )

    def error(self, logits_BTV: np.ndarray) -> float:
        """The largest relative error of a row's logits against that row alone, in one pass and without a cache."""
        return max(
            relative_error(logits_TV[positions_T >= 0], one_shot(self.weights, row))
            for row, logits_TV, positions_T in zip(self.rows, logits_BTV, self.positions_BT, strict=True)
        )


def weights_of(**config: Any) -> Weights:
    """A random model in float64."""
    with TemporaryDirectory() as directory:
        return opened(written(Path(directory), **config))


# Beyond its trained length the "dynamic" rotary embedding turns keys by the length of the sequence, so that a cache
# changes the result: no rewrite is at fault there.
models = configs().map(lambda config: weights_of(**{**config, "max_position_embeddings": 512}))


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Up to three rows of up to twelve tokens, with gaps anywhere, in chunks of any lengths, for any small model."""
    weights = draw(models)
    tokens = st.integers(0, weights.config.vocab_size - 1)
    rows = draw(st.lists(st.lists(tokens, min_size=1, max_size=12), min_size=1, max_size=3))
    columns = max(map(len, rows)) + draw(st.integers(0, 3))
    token_ids_BT = np.full((len(rows), columns), draw(tokens))
    positions_BT = np.full((len(rows), columns), -1)
    for b, row in enumerate(rows):
        taken = sorted(draw(st.permutations(range(columns)))[: len(row)])
        token_ids_BT[b, taken], positions_BT[b, taken] = row, np.arange(len(row))
    inner = draw(st.sets(st.integers(1, columns - 1))) if columns > 1 else set()
    return Run(
        weights, rows, token_ids_BT, positions_BT, [slice(*ends) for ends in pairwise([0, *sorted(inner), columns])]
    )


def chooses_as_without_a_cache(weights: Weights, rows: Prompts, step: Step, steps: int = 5) -> bool:
    """Whether greedy decoding by `step`, which is fed new tokens only, gives each row's own tokens."""
    token_ids_BT, positions_BT = left_padded(rows)
    chosen: list[np.ndarray] = []
    for _ in range(steps):
        chosen.append(step(token_ids_BT, positions_BT)[:, -1].argmax(axis=-1))
        token_ids_BT, positions_BT = chosen[-1][:, None], positions_BT[:, -1:] + 1
    expected = [generate(weights, [row], steps, cache=False)[0] for row in rows]
    return np.stack(chosen, axis=1).tolist() == expected


@cache
def trained(dtype: type) -> Weights:
    """The trained tiny model."""
    return opened(TRAINED, dtype=dtype)


def trained_run(seed: int) -> Run:
    """Rows of tokens for it in float32: a long one that it chose itself, and a short one left padded."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, trained(np.float32).config.vocab_size, 12).tolist()
    rows = [start + generate(trained(np.float32), [start], 24)[0], rng.integers(0, 384, 17).tolist()]
    token_ids_BT, positions_BT = left_padded(rows)
    T = token_ids_BT.shape[1]
    return Run(
        trained(np.float32), rows, token_ids_BT, positions_BT, [slice(0, T - 9), slice(T - 9, T - 1), slice(T - 1, T)]
    )


def is_noise(run: Run, logits_BTV: np.ndarray, judged_BT: np.ndarray | None = None) -> bool:
    """Whether float32 logits of the trained model are as near to float64's as an honest order of sums is.

    Where `judged` is not given, at every token that is there.
    """
    there_BT = run.positions_BT >= 0 if judged_BT is None else judged_BT
    given = run.token_ids_BT, run.positions_BT
    reference64_PV = forward(trained(np.float64), *given)[there_BT]
    orders = orders_for(len(reference64_PV)).values()
    errors = [rms(forward(trained(np.float32), *given, ops=ops)[there_BT] - reference64_PV, axis=-1) for ops in orders]
    noise = Noise.of(errors, reference64_PV)
    error_P = rms(logits_BTV[there_BT] - reference64_PV, axis=-1)
    overall, worst = rms(error_P) / rms(noise.rms_P), (error_P / noise.rms_P).max()
    return bool(overall <= noise.overall_bound and worst <= noise.position_bound)
