"""Every benchmark runs, on models so small that its figures say nothing, and prints the ratio that it is for."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import compare_share, judging, speed, strategies, streaming

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "fixtures" / "tiny_llama"
EXPORT = ROOT / "fixtures" / "exports" / "optimum" / "model.onnx"

Printed = Callable[[], str]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # benchmarks start `python -m` of their own


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str]) -> Printed:
    return lambda: capfd.readouterr().out


def ratios(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"^ratio ([\d.]+)", text, re.MULTILINE)]


def test_speed_prints_both_ratios_of_each_engine(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (("DECODED", 2), ("PREFILLED", 8), ("ROUNDS", 1)):
        monkeypatch.setattr(speed, name, small)
    speed.main(MODEL, EXPORT)
    rows = re.findall(r"^(refengine|ONNX Runtime, \w+) +[\d.]+ +([\d.]+) +[\d.]+ +([\d.]+)$", printed(), re.MULTILINE)
    assert [name for name, *_ in rows] == ["refengine", "ONNX Runtime, CPU", "ONNX Runtime, OpenVINO"]
    assert rows[0][1:] == ("1.00", "1.00")


def test_judging_confirms_every_token_and_prints_its_ratio_to_decoding(printed: Printed) -> None:
    judging.main(MODEL, generated=40, rounds=1)
    text = printed()
    assert "40 tokens after 16, float32, of which one pass confirms 40" in text
    # Far below what it is: this says that the figures are not swapped, not how fast anything is.
    (ratio,) = ratios(text)
    assert ratio > 1


def test_streaming_prints_how_much_less_memory_it_takes_than_keeping(printed: Printed, tmp_path: Path) -> None:
    small = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 1000}
    streaming.main({**streaming.LLAMA_3_2_1B, **small, "num_attention_heads": 8}, tmp_path)
    text = printed()
    assert "0.07 GB of weights in bfloat16, 128 tokens" in text
    # The weights alone are 0.14 GB in float32, a layer 0.02.
    (ratio,) = ratios(text)
    assert ratio > 1.2


def test_streaming_writes_a_checkpoint_once_into_a_directory_that_is_given(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    streaming.write_checkpoint(tmp_path, {**streaming.LLAMA_3_2_1B, **small})
    written = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    streaming.main(directory=tmp_path)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written


def test_compare_share_prints_both_shares_of_the_wall_time(printed: Printed) -> None:
    compare_share.main(MODEL, EXPORT, tokens=3)
    text = printed()
    assert "ort-cpu, 3 tokens a prompt, cache off and on" in text
    reference, all_but_the_candidate = ratios(text)
    assert 0 < reference < all_but_the_candidate < 1


def test_strategies_prints_what_batching_the_cache_and_blocks_are_worth(printed: Printed) -> None:
    strategies.main(MODEL, rounds=1, prefilled=700)
    text = printed()
    found = dict(re.findall(r"^ratio [\d.]+ (.*?) / (.*)$", text, re.MULTILINE))
    assert found == {
        "static": "continuous",
        "one at a time": "continuous",
        "without cache": "with cache",
        "in blocks": "all scores at once",
    }
    assert ratios(text)[-1] < 0.5  # of memory: the scores of 700 tokens against those of a block
