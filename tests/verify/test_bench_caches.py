"""`bench --kv-cache all`: every way of storing a cache has its bytes, its speed and what it costs in quality."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.model import forward
from refengine.quant import CALIBRATED, SCHEMES
from refengine.weights import Weights
from tests.verify.commands import Done, verify
from verify.bench import caches
from verify.bench.quality import qualities
from verify.bench.text import english_text

TINY = Path(__file__).parents[2] / "fixtures" / "tiny_llama"


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """The command on a short text, and where it wrote its files."""
    directory = tmp_path_factory.mktemp("studied")
    files = [
        "--json",
        directory / "caches.json",
        "--plot",
        directory / "caches.png",
        "--plot",
        directory / "caches.svg",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "TEXT_TOKENS", 60)
        patch.setattr(caches, "ROW_TOKENS", 30)
        patch.setattr(caches, "POSITIONS", (20, 40))
        return verify("bench", TINY, "--kv-cache", "all", *files), directory


def test_every_scheme_has_figures_or_is_left_out_with_a_reason(studied: tuple[Done, Path]) -> None:
    done, directory = studied
    assert (done.code, done.err) == (0, "")
    study = json.loads((directory / "caches.json").read_text(encoding="utf-8"))
    measured = [figures["scheme"] for figures in study["schemes"]]
    assert measured[0] == "float32"
    assert sorted([*measured, *study["left_out"]]) == sorted({*SCHEMES, *CALIBRATED} - {"float64"})
    assert all("expected" in reason for reason in study["left_out"].values())
    assert study["text_tokens"] == 60


def test_bytes_are_those_of_the_formula_and_quality_is_that_of_a_cache_that_rounds(studied: tuple[Done, Path]) -> None:
    study = json.loads((studied[1] / "caches.json").read_text(encoding="utf-8"))
    by_name = {figures["scheme"]: figures for figures in study["schemes"]}
    for name, figures in by_name.items():
        assert figures["bytes_per_token"] == pytest.approx(figures["bytes_by_formula"]), name
        assert set(figures["tokens_per_second"]) == {"20", "40"}
        assert all(math.isfinite(rate) and rate > 0 for rate in figures["tokens_per_second"].values())
    assert (by_name["float32"]["divergence"], by_name["float32"]["same_choice"]) == (0, 1)
    assert 0 < by_name["int8"]["divergence"] < by_name["int4"]["divergence"] / 10


def test_the_table_fits_80_columns_and_the_plots_are_what_their_names_say(studied: tuple[Done, Path]) -> None:
    done, directory = studied
    assert max(map(len, done.out.splitlines())) <= 80
    assert any(line.startswith("int8 ") for line in done.out.splitlines())
    assert (directory / "caches.png").read_bytes().startswith(b"\x89PNG")
    assert "int8-symmetric" in (directory / "caches.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("more", [("--runtime", "ort-cpu"), ("--kv-cache", "int8")])
def test_all_is_alone(more: tuple[str, ...]) -> None:
    done = verify("bench", TINY, "--kv-cache", "all", *more)
    assert (done.code, done.out) == (2, "")
    assert "--kv-cache all: measures every scheme on the reference engine" in done.err


def test_a_text_through_the_exact_cache_has_the_perplexity_of_one_pass() -> None:
    weights = Weights.open(open_checkpoint(TINY), np.float64)
    token_ids_BT = np.random.default_rng(0).integers(0, weights.config.vocab_size, (2, 20))
    logits_BTV = forward(weights, token_ids_BT, np.tile(np.arange(20), (2, 1)))[:, :-1]
    logits_BTV -= np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
    loss = -np.take_along_axis(logits_BTV, token_ids_BT[:, 1:, None], axis=-1).mean()
    (found,) = qualities(weights, {"float64": SCHEMES["float64"]}, token_ids_BT).values()
    assert found.perplexity == pytest.approx(float(np.exp(loss)), rel=1e-9)
    assert (found.divergence, found.same_choice) == (pytest.approx(0, abs=1e-12), 1)


def test_the_text_is_long_and_english() -> None:
    assert len(english_text()) > 100_000
    assert english_text().count(" the ") > 1000
