"""Policies that hide tokens: what they hide, what they hold, and that they say how far off they are."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine import inexact
from refengine.errors import CacheError, InputError, TokensError
from refengine.inexact import BlockSparse, Deviation, SinkCache, SinksAndWindow, deviation
from refengine.model import forward
from refengine.ops import OPS, Ops, attend, attention_mask
from refengine.tokens import left_padded
from refengine.weights import Weights
from tests.refengine.rewrites import Run, runs, trained_run, weights_of
from tests.refengine.strategies import BOUND, padded_positions, relative_error

Policy = SinksAndWindow | BlockSparse
sinks_and_windows = st.builds(SinksAndWindow, sinks=st.integers(0, 4), window=st.integers(1, 8))
block_sparse = st.builds(BlockSparse, block=st.integers(1, 4), local=st.integers(1, 3), every=st.integers(1, 4))
policies = sinks_and_windows | block_sparse


def ops_of(policy: Policy) -> Ops:
    return replace(OPS, attend=policy.attend)


@pytest.fixture(scope="module")
def model() -> Weights:
    return weights_of(num_hidden_layers=3)


def attention_by_loops(
    policy: Policy,
    q_BTNH: np.ndarray,
    k_BKSH: np.ndarray,
    v_BKSH: np.ndarray,
    positions_BT: np.ndarray,
    positions_BS: np.ndarray,
    window: int | None,
) -> np.ndarray:
    """The definition: query by query, key by key."""
    y_BTNH = np.zeros_like(q_BTNH)
    B, T, N, H = q_BTNH.shape
    for b, t, n in np.ndindex(B, T, N):
        p = int(positions_BT[b, t])
        seen = [s for s, other in enumerate(positions_BS[b].tolist()) if sees(policy, p, other, window)]
        if seen:
            kv = n // (N // k_BKSH.shape[1])
            weights = np.exp(k_BKSH[b, kv, seen] @ q_BTNH[b, t, n] / H**0.5)
            y_BTNH[b, t, n] = weights @ v_BKSH[b, kv, seen] / weights.sum()
    return y_BTNH


def sees(policy: Policy, p: int, other: int, window: int | None) -> bool:
    """Whether a token at position `p` sees the one at `other`."""
    if not 0 <= other <= p or (window is not None and p - other >= window):
        return False
    if isinstance(policy, SinksAndWindow):
        return other in range(policy.sinks) or other in range(p - policy.window + 1, p + 1)
    mine, its = p // policy.block, other // policy.block
    return its in range(mine - policy.local + 1, mine + 1) or its in range(0, mine + 1, policy.every)


@given(
    policy=policies,
    positions_BS=padded_positions(rows=2, most=11),
    new=st.integers(1, 11),
    window=st.none() | st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_attention_is_that_of_what_the_policy_shows(policy, positions_BS, new, window, seed) -> None:
    rng = np.random.default_rng(seed)
    q_BTNH = 2 * rng.standard_normal((2, new, 6, 4))
    k_BKSH, v_BKSH = rng.standard_normal((2, 2, 3, 11, 4))
    given_ = q_BTNH, k_BKSH, v_BKSH, positions_BS[:, -new:], positions_BS, window
    assert relative_error(policy.attend(*given_), attention_by_loops(policy, *given_)) <= BOUND


@given(policy=policies, run=runs())
def test_however_a_prompt_is_cut_padded_and_batched_the_logits_are_the_same(policy: Policy, run: Run) -> None:
    ops = ops_of(policy)
    cache = SinkCache(policy) if isinstance(policy, SinksAndWindow) else None
    if cache is None:
        logits_BTV = forward(run.weights, run.token_ids_BT, run.positions_BT, ops=ops)
    else:
        logits_BTV = run.fed(lambda ids, positions: forward(run.weights, ids, positions, cache, ops=ops))
    for row, logits_TV, positions_T in zip(run.rows, logits_BTV, run.positions_BT, strict=True):
        alone_TV = forward(run.weights, np.array([row]), np.arange(len(row))[None], ops=ops)[0]
        assert relative_error(logits_TV[positions_T >= 0], alone_TV) <= BOUND


@given(policy=sinks_and_windows, run=runs())
def test_the_sink_cache_holds_the_sinks_and_the_window_of_each_row_and_no_more(
    policy: SinksAndWindow, run: Run
) -> None:
    cache, config = SinkCache(policy), run.weights.config
    bytes_a_slot = 2 * config.num_hidden_layers * len(run.rows) * config.num_key_value_heads * config.head_dim * 8
    for new in run.chunks:
        forward(run.weights, run.token_ids_BT[:, new], run.positions_BT[:, new], cache, ops=ops_of(policy))
        newest_B = run.positions_BT[:, : new.stop].max(axis=1)
        seen_next = [sum(sees(policy, p + 1, other, None) for other in range(p + 1)) for p in newest_B.tolist()]
        assert cache.nbytes == bytes_a_slot * max(seen_next)
        assert cache.nbytes <= bytes_a_slot * (policy.sinks + policy.window - 1)


def test_a_long_text_leaves_the_sink_cache_at_its_bound(model: Weights) -> None:
    policy = SinksAndWindow(sinks=2, window=5)
    cache, sizes = SinkCache(policy), []
    for position in range(20):
        column = np.array([[position]])
        forward(model, column, column, cache, ops=ops_of(policy))
        sizes.append(cache.nbytes)
    slot = 2 * 3 * 2 * 10 * 8
    assert sizes == [slot * min(position + 1, 6) for position in range(20)]


everything_seen = st.sampled_from(
    [SinksAndWindow(0, 12), SinksAndWindow(12, 1), SinksAndWindow(5, 7), BlockSparse(3, 4, 9), BlockSparse(2, 1, 1)]
)


@given(policy=everything_seen, run=runs())
def test_a_policy_that_hides_nothing_is_exact(policy: Policy, run: Run) -> None:
    assert max(map(len, run.rows)) <= 12
    assert run.error(forward(run.weights, run.token_ids_BT, run.positions_BT, ops=ops_of(policy))) <= BOUND


@pytest.mark.parametrize("policy", [SinksAndWindow(2, 5), BlockSparse(2, 2, 3)], ids=str)
def test_tokens_before_the_first_hidden_one_are_exact_and_those_after_are_not(model: Weights, policy: Policy) -> None:
    tokens_1T, positions_1T = np.arange(3, 23)[None], np.arange(20)[None]
    found, expected = (forward(model, tokens_1T, positions_1T, ops=ops)[0] for ops in (ops_of(policy), OPS))
    hides = [not all(sees(policy, p, other, None) for other in range(p + 1)) for p in range(20)]
    first = hides.index(True)
    assert 3 < first < 10
    assert relative_error(found[:first], expected[:first]) <= BOUND
    assert all(relative_error(found[p], expected[p]) > 1e-4 for p in range(first, 20))


@pytest.mark.parametrize("policy", [SinksAndWindow(2, 5), BlockSparse(2, 1, 4)], ids=str)
def test_the_deviation_is_how_far_the_logits_are_from_the_exact_ones(model: Weights, policy: Policy) -> None:
    token_ids_BT, positions_BT = left_padded([list(range(20)), list(range(30, 45))])
    found, exact = (
        forward(model, token_ids_BT, positions_BT, ops=ops)[positions_BT >= 0] for ops in (ops_of(policy), OPS)
    )
    unit = np.sqrt(np.mean(exact**2))
    expected = Deviation(
        largest=np.abs(found - exact).max() / unit,
        rms=np.sqrt(np.mean((found - exact) ** 2)) / unit,
        same_choice=np.mean(found.argmax(axis=-1) == exact.argmax(axis=-1)),
    )
    assert 0 < expected.rms < expected.largest
    assert 0 < expected.same_choice < 1
    found_by = [deviation(model, token_ids_BT, positions_BT, ops_of(policy), chunk=7)]
    if isinstance(policy, SinksAndWindow):
        cache = SinkCache(policy)
        found_by.append(deviation(model, token_ids_BT, positions_BT, ops_of(policy), cache, chunk=6))
        assert cache.nbytes > 0
    for measured in found_by:
        assert vars(measured) == pytest.approx(vars(expected), rel=1e-9)


@pytest.mark.parametrize("policy", [SinksAndWindow(8, 64), BlockSparse(16, 2, 2)], ids=str)
def test_the_deviation_is_nothing_where_nothing_is_hidden(model: Weights, policy: Policy) -> None:
    measured = deviation(model, *left_padded([list(range(20)), [4, 5]]), ops_of(policy))
    assert measured.largest <= BOUND
    assert measured.rms <= BOUND
    assert measured.same_choice == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_on_the_trained_model_the_deviation_falls_as_the_window_grows(seed: int) -> None:
    run = trained_run(seed)
    shown = [SinksAndWindow(1, 6), SinksAndWindow(1, 20), SinksAndWindow(1, 40)]
    measured = [deviation(run.weights, run.token_ids_BT, run.positions_BT, ops_of(policy)) for policy in shown]
    assert measured[0].rms > 2 * measured[1].rms > 1e-2 > 1e-5 > measured[2].rms
    assert measured[0].same_choice < measured[1].same_choice < measured[2].same_choice == 1


def test_blocks_that_are_hidden_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    scores = inexact.scores

    def counted(q_BTNH: np.ndarray, k_BKSH: np.ndarray) -> np.ndarray:
        computed.append((q_BTNH.shape[1], k_BKSH.shape[2]))
        return scores(q_BTNH, k_BKSH)

    monkeypatch.setattr(inexact, "scores", counted)
    x_BTNH, positions_BT = np.ones((1, 32, 1, 2)), np.arange(32)[None]
    kv_BKSH = x_BTNH.swapaxes(1, 2)
    BlockSparse(block=4, local=2, every=3).attend(x_BTNH, kv_BKSH, kv_BKSH, positions_BT, positions_BT, None)
    blocks_seen = [1, 2, 3, 3, 3, 4, 4, 4]  # its own and the one before, and those of 0, 3 and 6 before these
    assert computed == [(4, 4 * blocks) for blocks in blocks_seen]


def test_a_window_of_the_models_own_hides_too() -> None:
    x_BTNH, positions_BT = np.random.default_rng(0).standard_normal((1, 9, 2, 4)), np.arange(9)[None]
    kv_BKSH = x_BTNH.swapaxes(1, 2)
    given_ = x_BTNH, kv_BKSH, kv_BKSH, positions_BT, positions_BT, 3
    assert relative_error(SinksAndWindow(4, 9).attend(*given_), attend(*given_)) <= BOUND
    assert not attention_mask(positions_BT, positions_BT, 3).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SinksAndWindow(-1, 4), "sinks: expected at least 0, found -1"),
        (lambda: SinksAndWindow(1, 0), "window: expected at least 1, found 0"),
        (lambda: BlockSparse(0, 1, 1), "block: expected at least 1, found 0"),
        (lambda: BlockSparse(1, 0, 1), "local: expected at least 1, found 0"),
        (lambda: BlockSparse(1, 1, 0), "every: expected at least 1, found 0"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(build, message: str) -> None:
    with pytest.raises(InputError) as refused:
        build()
    assert str(refused.value) == message


def test_a_deviation_of_nothing_is_refused(model: Weights) -> None:
    with pytest.raises(TokensError, match="found padding only"):
        deviation(model, np.zeros((1, 3), int), np.full((1, 3), -1), OPS)


def test_a_sink_cache_of_another_batch_is_refused(model: Weights) -> None:
    policy = SinksAndWindow(1, 3)
    cache = SinkCache(policy)
    forward(model, *left_padded([[1, 2], [3]]), cache, ops=ops_of(policy))
    with pytest.raises(CacheError, match=r"cache: expected keys and values like those held, \(2, 2, 2, 10\)"):
        forward(model, np.array([[4]]), np.array([[2]]), cache, ops=ops_of(policy))


def test_nothing_that_proves_uses_what_is_inexact() -> None:
    root = Path(inexact.__file__).parents[1]
    sources = [*(root / "verify").rglob("*.py"), root / "refengine" / "generate.py", root / "refengine" / "model.py"]
    assert len(sources) > 20
    assert [str(file) for file in sources if re.search(r"refengine(\.| import )inexact", file.read_text("utf-8"))] == []
