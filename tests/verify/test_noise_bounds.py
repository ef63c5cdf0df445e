"""The bounds let every honest float32 implementation pass: one that did not measure them too, on few positions too."""

from dataclasses import replace

import numpy as np
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.model import forward
from refengine.ops import OPS, Ops, attention_mask
from refengine.weights import Linear, Weights
from tests.checkpoints import write_checkpoint
from tests.verify.comparing import Compared
from verify.drive import CandidateRun
from verify.export import export_decoder
from verify.judge import judge
from verify.truth.noise import EQUIVALENT_ORDERS, orders_for


def linear_backwards(x_BTI: np.ndarray, proj: Linear) -> np.ndarray:
    """The inputs in the opposite order."""
    return np.ascontiguousarray(x_BTI[..., ::-1]) @ np.ascontiguousarray(proj.weight_OI[:, ::-1]).T


def linear_one_by_one(x_BTI: np.ndarray, proj: Linear) -> np.ndarray:
    """One input after the other into one sum: the least accurate that anybody would write."""
    y_BTO = np.zeros((*x_BTI.shape[:-1], len(proj.weight_OI)), x_BTI.dtype)
    for place in range(x_BTI.shape[-1]):
        y_BTO += x_BTI[..., place : place + 1] * proj.weight_OI[:, place]
    return y_BTO


def rms_norm_one_by_one(x_BTD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """One square after the other."""
    sum_BT1 = np.cumsum(x_BTD * x_BTD, axis=-1, dtype=x_BTD.dtype)[..., -1:]
    mean_BT1 = sum_BT1 / x_BTD.dtype.type(x_BTD.shape[-1])
    return x_BTD * (1 / np.sqrt(mean_BT1 + x_BTD.dtype.type(eps))) * weight_D


def attend_repeated(q_BTNH, k_BKSH, v_BKSH, positions_BT, positions_BS, window) -> np.ndarray:
    """Keys and values repeated, and a mask that is added, as exporters have it."""
    groups, dtype = q_BTNH.shape[2] // k_BKSH.shape[1], q_BTNH.dtype.type
    k_BNSH, v_BNSH = (np.repeat(x_BKSH, groups, axis=1) for x_BKSH in (k_BKSH, v_BKSH))
    scores_BNTS = np.einsum("btnh,bnsh->bnts", q_BTNH, k_BNSH) * dtype(q_BTNH.shape[-1] ** -0.5)
    bias_BTS = np.where(attention_mask(positions_BT, positions_BS, window), dtype(0), dtype(-1e38))
    weights_BNTS = np.exp(scores_BNTS + bias_BTS[:, None] - (scores_BNTS + bias_BTS[:, None]).max(-1, keepdims=True))
    return np.einsum("bnts,bnsh->btnh", weights_BNTS / weights_BNTS.sum(-1, keepdims=True), v_BNSH)


HONEST = {
    **EQUIVALENT_ORDERS,
    "inputs backwards": replace(OPS, linear=linear_backwards),
    "sums one by one": replace(OPS, linear=linear_one_by_one),
    "norms one by one": replace(OPS, rms_norm=rms_norm_one_by_one),
    "keys repeated": replace(OPS, attend=attend_repeated),
    "all of these": Ops(
        linear=linear_backwards,
        rms_norm=rms_norm_one_by_one,
        attend=attend_repeated,
        rope_table=EQUIVALENT_ORDERS["as exporters write it"].rope_table,
        silu_gate=EQUIVALENT_ORDERS["as exporters write it"].silu_gate,
    ),
}


def run_as(compared: Compared, ops: Ops) -> CandidateRun:
    """The float32 reference in another order as if it were a candidate, each row alone."""
    weights, reference = Weights.open(compared.checkpoint, np.float32), compared.reference
    logits = []
    for prompt, new in zip(reference.prompts, reference.tokens, strict=True):
        row = np.array([[*prompt, *new[:-1]]])
        logits.append(forward(weights, row, np.arange(row.shape[1])[None], ops=ops)[0])
    tokens = [row[-compared.max_new_tokens :].argmax(axis=-1).tolist() for row in logits]
    return CandidateRun(tokens, logits, {}, 0.0)


@pytest.fixture(scope="module")
def other_prompts(compared) -> Compared:
    """The first half of one prompt, and the end of another."""
    prompts = [compared.prompts[0][:20], compared.prompts[1][-12:]]
    return Compared(compared.checkpoint, prompts, 4)


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_order_taken_for_a_candidate_is_equal(compared, other_prompts, name):
    for of in (compared, other_prompts):
        verdict, tokens, noise = judge(run_as(of, HONEST[name]), of.reference)
        assert (verdict, tokens.first_mismatch) == ("equal", None)
        assert noise.logits > 0.3


@pytest.mark.parametrize(("length", "new"), [(1, 1), (2, 1), (1, 3), (4, 2)])
def test_a_clean_export_is_equal_on_the_fewest_positions(tmp_path, length, new):
    """Where the noise is measured on few positions, luck alone must not make it look small."""
    for seed in range(4):
        checkpoint = open_checkpoint(write_checkpoint(tmp_path / str(seed), seed=seed))
        export_decoder(checkpoint, tmp_path / f"{seed}.onnx")
        prompts = [np.random.default_rng(seed).integers(0, 67, length).tolist()]
        cells = Compared(checkpoint, prompts, new).cells(tmp_path / f"{seed}.onnx")
        assert {cell.verdict for cell in cells.values()} == {"equal"}


@pytest.mark.parametrize("positions", [1, 2, 5, 15, 16, 17, 1000])
def test_the_fewer_the_positions_the_more_the_orders(positions):
    orders = orders_for(positions)
    assert orders.items() >= EQUIVALENT_ORDERS.items()
    assert len(orders) * positions >= 64
    assert len(orders) == len(EQUIVALENT_ORDERS) or (len(orders) - 1) * positions < 64
