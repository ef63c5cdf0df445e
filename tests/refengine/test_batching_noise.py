"""In float32 a batch changes the trained model's logits by no more than noise, and none of its tokens."""

import numpy as np
import pytest

from refengine.batching import CONTINUOUS, DYNAMIC, STATIC
from refengine.requests import Limits
from refengine.tokens import left_padded
from tests.refengine.rewrites import Run, is_noise, trained
from tests.refengine.sessions import alone_of, session


@pytest.mark.parametrize("policy", [STATIC, DYNAMIC, CONTINUOUS], ids=["static", "dynamic", "continuous"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_trained_model_in_float32_gets_its_tokens_and_logits_with_no_more_than_noise(policy, seed):
    random, weights = np.random.default_rng(seed), trained(np.float32)
    made = session(weights, policy, Limits(3, max_prefill_tokens=16))
    for length in random.integers(1, 40, 6).tolist():
        made.add((random.integers(0, weights.config.vocab_size, length).tolist(), int(random.integers(2, 12))))
        made.step()
    made.finish()
    rows = [[*prompt, *made.got[id][:-1]] for id, (prompt, _) in made.asked.items()]
    token_ids_BT, positions_BT = left_padded(rows)
    judged_BT = np.zeros(token_ids_BT.shape, bool)
    logits_BTV = np.zeros((*token_ids_BT.shape, weights.config.vocab_size), np.float32)
    for id, (prompt, most) in made.asked.items():
        assert made.got[id] == alone_of(weights, prompt, most)
        judged_BT[id, -len(made.got[id]) :] = True
        logits_BTV[id, -len(made.got[id]) :] = made.batching.logits[id]
    run = Run(weights, rows, token_ids_BT, positions_BT, [])
    assert is_noise(run, logits_BTV, judged_BT)
    assert not is_noise(run, np.roll(logits_BTV, 1, axis=0), judged_BT)
