"""What an export's own weights cost: how far what they compute is from what the checkpoint's compute."""

from collections.abc import Sequence

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.ops import OPS
from refengine.quant import ops_for
from refengine.scheme import Scheme
from refengine.weights import Weights
from verify.report.weights import WeightsCost
from verify.truth.reference import ReferenceRun, chosen, one_pass


def cost_of_weights(run: ReferenceRun, own: Checkpoint, scheme: Scheme | None = None) -> WeightsCost:
    """The checkpoint's run against a pass over the same tokens with an export's own weights, both in float64.

    Args:
        run: the checkpoint's.
        own: the same model with the export's weights, read layer by layer.
        scheme: of the run's cache; None where it is exact.

    Raises:
        CheckpointError: the export's weights are not all finite.
    """
    weights, ops = Weights.open(own, np.float64, resident=False), OPS if scheme is None else ops_for(scheme)
    logits_PV, _ = one_pass(weights, run.prompts, run.tokens, scheme, ops)
    return compare_predictions(run, logits_PV)


def compare_predictions(run: ReferenceRun, own_PV: np.ndarray) -> WeightsCost:
    """The checkpoint's run against other logits at the same positions.

    Every position predicts the token after it: of a row's prompt and of its new tokens.
    """
    rows = [[*prompt, *new] for prompt, new in zip(run.prompts, run.tokens, strict=True)]
    next_P = [token for row in rows for token in row[1:]]
    divergence_P, exact_nats_P, own_nats_P = np.array(
        [
            _position(exact_V, own_V, token)
            for exact_V, own_V, token in zip(run.logits.value64_PX, own_PV, next_P, strict=True)
        ]
    ).T
    choices = _flat(chosen(own_PV, run.prompts, run.tokens))
    return WeightsCost(
        tokens=len(choices),
        changed=sum(mine != right for mine, right in zip(choices, _flat(run.tokens), strict=True)),
        divergence=float(divergence_P.mean()),
        largest_divergence=float(divergence_P.max()),
        perplexity=float(np.exp(exact_nats_P.mean())),
        own_perplexity=float(np.exp(own_nats_P.mean())),
    )


def _position(exact_V: np.ndarray, own_V: np.ndarray, token: int) -> tuple[float, float, float]:
    """The Kullback-Leibler divergence of the second from the first, and the surprise of both at a token, in nats."""
    exact, own = _log_probabilities(exact_V), _log_probabilities(own_V)
    # Rounding may leave a little less than nothing where both are the same.
    divergence = max(0.0, float(np.exp(exact) @ (exact - own)))
    return divergence, -float(exact[token]), -float(own[token])


def _log_probabilities(logits_V: np.ndarray) -> np.ndarray:
    shifted = logits_V - logits_V.max()
    return shifted - np.log(np.exp(shifted).sum())


def _flat(rows: Sequence[Sequence[int]]) -> list[int]:
    return [token for row in rows for token in row]
