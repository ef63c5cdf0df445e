"""What a server does to its logits before it chooses is named, as of any other record."""

from typing import Any

import numpy as np
import pytest

from refengine.model import forward
from refengine.weights import Weights
from tests.verify.comparing import Compared, Notes
from tests.verify.scripted_server import MODELS, Reply, scripted_server
from verify.expect import EXACT
from verify.report.result import Report
from verify.verbs.run_openai import judge_server

pytest.importorskip("urllib3")

NEW, PENALTY = 24, 1.2


@pytest.fixture(scope="module")
def penalising(compared: Compared) -> Any:
    """A server that makes every token that was there less likely, and gives no log-probabilities."""
    weights = Weights.open(compared.checkpoint)

    def reply(path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return MODELS
        row = list(body["prompt"])
        for _ in range(NEW):
            logits_V = forward(weights, np.array([row]), np.arange(len(row))[None], last=True)[0, -1]
            seen = np.unique(row)
            logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / PENALTY, logits_V[seen] * PENALTY)
            row.append(int(logits_V.argmax()))
        new = row[len(body["prompt"]) :]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": NEW}
        return Reply({"choices": [{"text": "", "token_ids": new, "finish_reason": "length"}], "usage": usage})

    return reply


def report_on(compared: Compared, base_url: str, seconds: float | None) -> Report:
    options = {"base_url": base_url, "retries": "0", "logprobs": "0"}
    return judge_server(compared.checkpoint, compared.prompts, NEW, options, EXACT, Notes(), seconds)


def test_a_repetition_penalty_of_a_server_is_named(compared, penalising):
    with scripted_server(penalising) as server:
        report = report_on(compared, server.base_url, 300)
    assert (report.verdict, report.diagnosis) == ("mismatch", "named")
    cause = report.diagnosed.causes[0]
    assert cause.name == "repetition-penalty"
    assert cause.parameters["least"] <= PENALTY <= cause.parameters["most"]


def test_nothing_is_looked_for_where_nobody_asks(compared, penalising):
    with scripted_server(penalising) as server:
        report = report_on(compared, server.base_url, None)
    assert (report.verdict, report.diagnosis, report.diagnosed) == ("mismatch", "unexplained", None)
