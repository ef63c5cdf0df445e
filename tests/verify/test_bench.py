"""`bench`: what it prints and writes, what it refuses, and what happens to a row that cannot be measured."""

import json
import math
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.verify.commands import Done, verify, verify_elsewhere
from verify.runtimes import USUAL

FOR_ALL = ["no cache", "cache", "batch", "batch, cache", "continuous"]
ON_REFERENCE = [*FOR_ALL[:-1], "batch, cache, int8", "continuous"]
BATCH, NEW_TOKENS = 3, 4


@dataclass(frozen=True)
class Whole:
    """A benchmark of the embedded model and its export, in a pipe, and its files."""

    done: Done
    directory: Path

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.directory / "bench.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    directory = tmp_path_factory.mktemp("bench")
    files = ("--json", "bench.json", "--plot", "bench.png", "--plot", "bench.svg")
    runtimes = ("--runtime", "ort-cpu", "--runtime", "ort-openvino")
    work = ("--batch-size", BATCH, "--max-new-tokens", NEW_TOKENS)
    done = verify_elsewhere("bench", *work, *runtimes, *files, cwd=directory)
    return Whole(done, directory)


def test_every_strategy_of_every_engine_has_finite_figures(whole):
    assert whole.done.code == 0, whole.done.err
    rows = whole.json["rows"]
    assert [(row["engine"], row["strategy"]) for row in rows] == [
        *(("reference", strategy) for strategy in ON_REFERENCE),
        *(("ort-cpu", strategy) for strategy in FOR_ALL),
        *(("ort-openvino", strategy) for strategy in FOR_ALL),
    ]
    for row in rows:
        assert row["reason"] is None
        figures = row["figures"]
        numbers = [figures[name] for name in ("tokens_per_second", "times_first_row", "share_of_roofline")]
        numbers += [*figures["first_token"].values(), *figures["further_token"].values()]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert figures["peak_bytes"] is None or figures["peak_bytes"] > 10**7
    assert rows[0]["figures"]["times_first_row"] == 1


def test_json_says_what_was_measured_and_on_what(whole):
    report = whole.json
    assert list(report) == [
        "schema",
        "machine",
        "model",
        "model_type",
        "candidate",
        "prompt_length",
        "max_new_tokens",
        "rows",
        "curves",
    ]
    assert (report["schema"], report["model_type"], report["max_new_tokens"]) == (1, "llama", NEW_TOKENS)
    assert Path(report["model"]).name == "tiny_llama"
    assert "NumPy" in report["machine"]["text"]
    assert min(report["machine"]["bandwidth"], report["machine"]["flops"]) > 0
    work = {row["strategy"]: (row["batch_size"], row["requests"], row["new_tokens"]) for row in report["rows"]}
    assert work["cache"] == (1, 1, 4)
    assert work["batch, cache"] == (3, 3, 12)
    assert work["continuous"] == (3, 12, 3 * 4 + 9 * 1)


def test_the_table_fits_a_pipe_and_has_a_line_for_each_row(whole):
    lines = whole.done.out.splitlines()
    assert max(map(len, lines)) <= 80
    for row in whole.json["rows"]:
        begins = f"{row['engine']:12} {row['strategy']:18} "
        (line,) = (line for line in lines if line.startswith(begins))
        assert len(line[len(begins) :].split()) == 7
    assert lines[0].startswith("machine ")
    assert whole.done.err == ""


def test_both_kinds_of_plot_are_what_their_names_say(whole):
    assert (whole.directory / "bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    svg = (whole.directory / "bench.svg").read_text(encoding="utf-8")
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    for text in ("without cache", "with cache", "position in the sequence, tokens", "time for one token, ms"):
        assert f"<!-- {text}" in svg
    assert sorted(file.name for file in whole.directory.iterdir()) == ["bench.json", "bench.png", "bench.svg"]


def test_the_curves_go_to_the_last_position_of_a_short_model(whole):
    without, with_ = whole.json["curves"]
    assert (without["name"], with_["name"]) == ("without cache", "with cache")
    assert without["positions"] == with_["positions"] == sorted(set(with_["positions"]))
    assert (with_["positions"][0], with_["positions"][-1]) == (1, 512)
    assert len(with_["seconds"]) == len(with_["positions"]) == len(without["seconds"])
    assert min(*with_["seconds"], *without["seconds"]) > 0


def test_a_model_alone_is_measured_on_the_reference_and_a_lone_token_has_no_further_ones(small):
    quick = ("--batch-size", 2, "--max-new-tokens", 1)
    done = verify("bench", small.checkpoint, *quick, "--kv-cache", "float16", "--kv-cache", "int4", "--json", "-")
    assert done.code == 0
    report = json.loads(done.out)
    names = [*FOR_ALL[:-1], "batch, cache, float16", "batch, cache, int4", "continuous"]
    assert [(row["engine"], row["strategy"]) for row in report["rows"]] == [("reference", name) for name in names]
    assert {row["figures"]["further_token"] for row in report["rows"]} == {None}
    assert (report["candidate"], report["curves"]) == (None, [])
    assert done.err.startswith("machine ")  # a person who waits sees the table all the same


def test_an_export_that_no_runtime_can_open_is_rows_with_a_reason_and_the_others_go_on(small, tmp_path):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(small.export.read_bytes()[:1000])
    file = tmp_path / "bench.json"
    quick = ("--batch-size", 2, "--max-new-tokens", 1, "--json", file)
    done = verify("bench", small.checkpoint, broken, *quick)
    assert done.code == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert list(dict.fromkeys(row["engine"] for row in rows)) == ["reference", *USUAL]
    for row in rows:
        assert (row["figures"] is None) == (row["engine"] in USUAL) == (row["reason"] is not None)
    (line,) = (line for line in done.out.splitlines() if line.startswith("ort-cpu ("))
    assert line.startswith("ort-cpu (no cache; cache; batch; batch, cache; continuous): ")
    assert f"{broken}: not a whole ONNX file" in line
    assert done.err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--plot", "curve.pdf"), "--plot: expected a file name that ends in .png or .svg, found 'curve.pdf'"),
        (("--plot", "nowhere/curve.png"), "no such directory nowhere to write to"),
        (("--json", "nowhere/bench.json"), "no such directory nowhere to write to"),
        (("--kv-cache", "int3"), "KV cache: expected one of float64, float32"),
        (("--max-new-tokens", "9999"), "--max-new-tokens: 16 prompt tokens and 9999 new ones exceed"),
        (("--runtime", "ort-cpu"), "--runtime: expected MODEL and CANDIDATE, or neither, found MODEL alone"),
        (("no-such-export.onnx",), "no-such-export.onnx: no such file or directory"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(small, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    done = verify("bench", small.checkpoint, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("--batch-size", "0"), ("--max-new-tokens", "x"), ("--runtime", "abacus")])
def test_wrong_usage_ends_with_2(small, arguments):
    assert verify("bench", small.checkpoint, small.export, *arguments).code == 2


def test_a_plot_without_matplotlib_names_the_extra(small, tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not there
    done = verify("bench", small.checkpoint, "--plot", tmp_path / "curve.png")
    assert (done.code, done.out) == (2, "")
    assert 'pip install "tokenproof[plot]"' in done.err
    assert list(tmp_path.iterdir()) == []
