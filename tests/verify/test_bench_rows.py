"""What stands behind the rows of `bench`: decoding, taking turns, processes of their own, and the roofline."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from refengine import Weights, generate, open_checkpoint
from refengine.cost import pass_cost
from refengine.machine import Machine
from refengine.scheme import FLOAT32
from tests.verify.commands import Small
from verify.bench.decoding import candidate_pass, decode, prepare, reference_pass
from verify.bench.positions import curves
from verify.bench.rounds import measure
from verify.bench.strategies import PROMPT_LENGTH, Task, least_seconds, strategies_of_all, strategies_of_reference
from verify.errors import NoVerdict
from verify.machine import forget_peak, machine, peak_memory
from verify.runtimes import RUNTIMES

FIXTURES = Path(__file__).parents[2] / "fixtures"
BATCH, NEW_TOKENS = 2, 5
RATES = Machine(bandwidth=1e9, flops=1e9)
ALL = {strategy.name: strategy for strategy in strategies_of_all(BATCH)}
OF_REFERENCE = {strategy.name: strategy for strategy in strategies_of_reference(BATCH, ["int8"])}


def task(small: Small, strategy: str = "no cache", runtime: str | None = None) -> Task:
    config = open_checkpoint(small.checkpoint).config
    asked = OF_REFERENCE[strategy], small.checkpoint, config, NEW_TOKENS
    return Task(*asked, runtime, small.export) if runtime else Task(*asked)


def ignore(_: Task) -> None:
    """Told of rows, does nothing."""


@pytest.mark.parametrize("strategy", ALL.values(), ids=ALL)
@pytest.mark.parametrize("engine", ["reference", "ort-cpu"])
def test_what_is_timed_are_the_tokens_that_each_prompt_gets_alone(small, engine, strategy):
    weights = Weights.open(open_checkpoint(small.checkpoint))
    prompts_BT = np.random.default_rng(3).integers(0, weights.config.vocab_size, (strategy.batch_size, 7))
    run = reference_pass(weights, strategy)
    if engine != "reference":
        opened = RUNTIMES[engine](small.export, engine, {}, weights.config)
        run = candidate_pass(opened, strategy.cached)
    steps = islice(decode(run, prompts_BT, strategy.cached), NEW_TOKENS)
    alone = [generate(weights, [prompt], NEW_TOKENS)[0] for prompt in prompts_BT.tolist()]
    assert np.stack(list(steps), axis=1).tolist() == alone


@pytest.mark.parametrize(
    ("strategy", "runtime"), [*((strategy, None) for strategy in OF_REFERENCE), *((name, "ort-cpu") for name in ALL)]
)
def test_a_turn_gives_every_request_its_tokens(small, strategy, runtime):
    measured = task(small, strategy, runtime)
    sample = prepare(measured)()
    requests, batches = len(measured.new_tokens), 1
    timed = requests if strategy == "continuous" else batches  # the rows of a batch get their tokens together
    assert sample.tokens == sum(measured.new_tokens)
    assert len(sample.first) == timed
    assert len(sample.further) == (sample.tokens - requests) // (
        1 if timed == requests else measured.strategy.batch_size
    )
    assert 0 < max(sample.first) <= sample.seconds


def test_a_row_whose_runtime_is_missing_says_which_extra_has_it(small, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)  # a process that is started gets it too
    reference, missing = measure([task(small), task(small, runtime="ort-openvino")], RATES, ignore)
    assert reference.figures is not None
    assert missing.figures is None
    assert 'ort-openvino: onnxruntime cannot be imported (not here): pip install "tokenproof[' in (missing.reason or "")


def test_an_export_without_a_cache_has_no_row_with_one(tiny, without_cache):
    asked = tiny.path, tiny.config, 1, "ort-cpu", without_cache
    tasks = [Task(ALL[name], *asked) for name in ("no cache", "cache")]
    plain, cached = measure(tasks, RATES, ignore)
    assert plain.figures is not None
    assert "the export has no past_key_values input" in (cached.reason or "")


def test_without_a_first_row_there_are_figures_but_no_ratios(small, tmp_path):
    nowhere = Task(ALL["no cache"], tmp_path / "nowhere", task(small).config, NEW_TOKENS)
    first, second = measure([nowhere, task(small, "cache")], RATES, ignore)
    assert "nowhere: no such file or directory" in (first.reason or "")
    assert second.figures is not None
    assert second.figures.times_first_row is None


def test_an_interrupt_leaves_no_process_behind(small):
    before = set(psutil.Process().children())  # other tests may have left some

    def interrupt(row: Task) -> None:
        if row.strategy.name == "cache":  # the first row's process is there, and waits
            assert len(set(psutil.Process().children()) - before) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([task(small), task(small, "cache")], RATES, interrupt)
    assert set(psutil.Process().children()) <= before


def test_the_roofline_of_a_strategy_is_that_of_its_passes(small):
    config = task(small).config
    passes = {
        "cache": [pass_cost(config, 1, PROMPT_LENGTH, scheme=FLOAT32)]
        + [pass_cost(config, 1, 1, PROMPT_LENGTH + step, FLOAT32) for step in range(NEW_TOKENS - 1)],
        "batch": [pass_cost(config, BATCH, PROMPT_LENGTH + step) for step in range(NEW_TOKENS)],
    }
    for strategy, costs in passes.items():
        expected = sum(cost.seconds(RATES) for cost in costs)
        assert least_seconds(task(small, strategy), RATES) == pytest.approx(expected, rel=1e-12)


def test_a_quantised_cache_reads_less_and_requests_of_mixed_lengths_fill_the_batch(small):
    slow_memory = Machine(bandwidth=1.0, flops=1e30)
    least = {name: least_seconds(task(small, name), slow_memory) for name in OF_REFERENCE}
    assert least["batch, cache, int8"] < least["batch, cache"] < least["batch"]
    # Four requests a row, three of them of a quarter of the tokens, at least one.
    lone = Task(ALL["batch, cache"], small.checkpoint, task(small).config, 1)
    assert least["continuous"] == pytest.approx(least["batch, cache"] + 3 * least_seconds(lone, slow_memory))


def test_curves_of_a_short_model_end_with_its_positions(small):
    weights = Weights.open(open_checkpoint(small.checkpoint))
    for curve in curves(weights, longest=10**6):
        assert curve.positions[0] == 1
        assert curve.positions[-1] == weights.config.max_position_embeddings == 128
        assert len(curve.seconds) == len(curve.positions)
        assert min(curve.seconds) > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets its peak")
def test_the_peak_is_that_of_what_was_held_since_it_was_forgotten():
    forget_peak()
    before = peak_memory()
    held = np.ones(2**26, np.uint8)
    with_it = peak_memory()
    del held
    assert with_it - before > 2**25
    assert peak_memory() > with_it - 2**22  # the system counts with a little delay
    forget_peak()
    assert peak_memory() < with_it - 2**25


def test_the_machine_is_one_line_with_its_cores_and_versions():
    assert f"NumPy {np.__version__}" in machine()
    assert "cores of " in machine()
    assert "ONNX Runtime 1." in machine()
    assert "\n" not in machine()


def test_an_export_whose_batch_nobody_can_join_has_a_reason(small):
    unable = task(small, "continuous", "openvino")
    unable = replace(
        unable, candidate=FIXTURES / "exports" / "optimum-intel", config=open_checkpoint(FIXTURES / "tiny_llama").config
    )
    with pytest.raises(NoVerdict, match="rows cannot join and leave a batch of this export's"):
        prepare(unable)
