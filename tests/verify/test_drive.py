"""However a candidate is driven (cache, batch, exports that give less), it is asked for the same tokens."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import pytest

from refengine.generate import generate
from refengine.weights import Weights
from tests.verify.faulty import keep_last_logits, write_faulty
from tests.verify.handmade import ONE_LAYER, K, N, repeating_decoder
from verify.candidates.ort import OrtCandidate
from verify.drive import CandidateRun, run_candidate
from verify.errors import NoVerdict
from verify.judge import judge


def drive(compared, path, **how) -> CandidateRun:
    given = {"use_cache": True, "batch_size": 3} | how
    return run_candidate(compared.open(path), compared.prompts, compared.max_new_tokens, **given)


@pytest.fixture(scope="module")
def run(compared, clean) -> CandidateRun:
    return drive(compared, clean)


@pytest.fixture(scope="module")
def last_logits(compared, tmp_path_factory):
    """An export that gives the logits of the last token alone."""
    path = tmp_path_factory.mktemp("last") / "model.onnx"
    return write_faulty(compared.checkpoint, path, edit=keep_last_logits)


@pytest.mark.parametrize(("use_cache", "batch_size"), list(product((True, False), (1, 2, 3, 7))))
def test_cache_and_batch_change_neither_tokens_nor_logits(compared, clean, run, use_cache, batch_size):
    other = drive(compared, clean, use_cache=use_cache, batch_size=batch_size)
    assert other.tokens == run.tokens
    assert other.caches.keys() == run.caches.keys()
    assert [len(logits) for logits in other.logits] == compared.reference.lengths
    verdict, _, noise = judge(other, compared.reference)
    assert verdict == "equal"
    assert max(noise.cache.values()) < 4


def test_tokens_are_those_that_the_float32_reference_generates(compared, run):
    weights = Weights.open(compared.checkpoint, np.float32)
    endless = replace(weights, config=replace(weights.config, eos_token_id=()))
    assert run.tokens == generate(endless, compared.prompts, compared.max_new_tokens)


def test_an_end_token_does_not_end_a_row(compared, clean):
    """The model's end token follows the text that its training joined with one."""
    end = compared.checkpoint.config.eos_token_id[0]
    forced = [[end] * compared.max_new_tokens] * 3
    assert [len(row) for row in drive(compared, clean, forced=forced).tokens] == [compared.max_new_tokens] * 3


def test_the_cache_holds_every_position_of_its_row_and_no_padding(compared, run):
    config = compared.checkpoint.config
    width = config.num_key_value_heads * config.head_dim
    assert len(run.caches) == 2 * config.num_hidden_layers
    for rows in run.caches.values():
        assert [row.shape for row in rows] == [(length, width) for length in compared.reference.lengths]


def test_an_export_without_a_cache_gives_the_same_tokens_and_no_caches(compared, without_cache, run):
    other = drive(compared, without_cache, use_cache=False)
    assert other.tokens == run.tokens
    assert other.caches == {}


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_export_with_logits_of_the_last_token_alone_gives_the_same_tokens(compared, last_logits, run, use_cache):
    other = drive(compared, last_logits, use_cache=use_cache)
    assert other.tokens == run.tokens
    assert [len(logits) for logits in other.logits] == [compared.max_new_tokens] * 3
    for mine, whole in zip(other.logits, run.logits, strict=True):
        np.testing.assert_allclose(mine, whole[-compared.max_new_tokens :], atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_forced_tokens_are_fed_whatever_the_candidate_chooses(compared, clean, run, use_cache):
    forced = [[5, 4, 3, 2, 9, 8, 7, 6]] * 3
    other = drive(compared, clean, use_cache=use_cache, forced=forced, batch_size=2)
    assert [row[0] for row in other.tokens] == [row[0] for row in run.tokens]  # nothing was forced before it
    weights = Weights.open(compared.checkpoint, np.float32)
    for prompt, mine, chosen in zip(compared.prompts, forced, other.tokens, strict=True):
        after_each = [[*prompt, *mine[:step]] for step in range(len(mine))]
        assert chosen == [generate(weights, [tokens], 1)[0][0] for tokens in after_each]


def test_each_step_tells_how_many_tokens_were_gained(compared, clean):
    gained: list[int] = []
    drive(compared, clean, batch_size=2, on_step=gained.append)
    assert gained == [2] * 8 + [1] * 8


def test_one_new_token_needs_no_second_run(compared, clean, run):
    one = run_candidate(compared.open(clean), compared.prompts, 1, use_cache=True, batch_size=3)
    assert one.tokens == [row[:1] for row in run.tokens]
    assert [len(logits) for logits in one.logits] == [len(prompt) for prompt in compared.prompts]


def test_a_runtime_that_fails_in_the_middle_gives_no_verdict(tmp_path):
    candidate = OrtCandidate.open(repeating_decoder(tmp_path / "model.onnx", heads=K), "ort-cpu", {}, ONE_LAYER)
    with pytest.raises(NoVerdict, match="ort-cpu failed"):
        run_candidate(candidate, [[1, 2]], 3, use_cache=True, batch_size=1, forced=[[3, 999, 3]])


def test_a_past_built_with_query_heads_gives_no_verdict_in_either_mode(tmp_path):
    path = repeating_decoder(tmp_path / "model.onnx", heads=N, kv_heads="kv_heads")
    candidate = OrtCandidate.open(path, "ort-cpu", {}, ONE_LAYER)
    for use_cache in (True, False):
        with pytest.raises(NoVerdict, match=r"6 is num_attention_heads and 2 num_key_value_heads: its past was built"):
            run_candidate(candidate, [[1, 2]], 3, use_cache=use_cache, batch_size=1)


def test_a_fixed_batch_that_does_not_divide_the_prompts_gives_no_verdict(compared, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", edit=take_two_rows)
    candidate = compared.open(path)
    assert candidate.interface.batch_size == 2
    prompts = [compared.prompts[0]] * 3
    with pytest.raises(NoVerdict, match=r"takes shape \[2, .*\] alone"):
        run_candidate(candidate, prompts, 2, use_cache=True, batch_size=2)


def take_two_rows(model: onnx.ModelProto) -> None:
    for value in inputs_and_outputs(model):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def inputs_and_outputs(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    yield from model.graph.input
    yield from model.graph.output
