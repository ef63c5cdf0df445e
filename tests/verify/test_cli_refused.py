"""What cannot be used or run: one line on standard error, an exit code that says which, and nothing written."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.verify.commands import Done, Small, verify, verify_elsewhere
from tests.verify.damage import BAD, weights_that_are_nan


@pytest.fixture
def copy(small, tmp_path) -> Small:
    """A copy of the small model to do damage to."""
    shutil.copytree(small.directory, tmp_path / "copy")
    return Small(tmp_path / "copy")


def assert_refused(done: Done, *words: str, code: int = 2) -> None:
    """One line, its exit code, and no report."""
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("verify: ")
    for word in words:
        assert word in line
    assert "Traceback" not in line
    assert done.code == code


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_input_is_one_line_and_nothing_is_written(copy, damage):
    words = damage(copy)
    before = contents(copy.directory)
    out, reference = copy.directory / "report.json", copy.directory / "reference.npz"
    assert_refused(copy.compare("--json", out, "--save-reference", reference), *words)
    assert contents(copy.directory) == before


def contents(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--provider-option", "device_type"], ["--provider-option: expected KEY=VALUE, found 'device_type'"]),
        (["--provider-option", "=CPU"], ["--provider-option: expected KEY=VALUE, found '=CPU'"]),
        (["--json", "nowhere/report.json"], ["nowhere/report.json: no such directory"]),
        (["--json", "."], ["is a directory; expected the name of a file"]),
        (["--save-reference", "nowhere/reference.npz"], ["nowhere/reference.npz: no such directory"]),
        (["--reference", "nowhere.npz"], ["nowhere.npz: not a whole reference run", "No such file"]),
        (
            ["--python", f"genai={sys.executable}"],
            ["'genai' is none of the runtimes that are compared", "--runtime genai"],
        ),
        (["--python", "genai=nowhere"], ["--python: expected a Python interpreter", "found 'genai=nowhere'"]),
        (["--repro", __file__], ["expected a new or empty directory, found the file", "test_cli_refused.py"]),
        (["--repro", f"{__file__}/deeper"], ["expected a new or empty directory, found the file"]),
        (["--repro", Path(__file__).parent], ["expected a new or empty directory, found other files there"]),
        (["--repro", "graph", "--no-diagnose"], ["--repro: ", "found --no-diagnose"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt: prompts could not be read"]),
        (["--max-tokens", 40], ["--max-tokens: limits dynamic batches alone, found --batching static"]),
        (["--batching", "continuous", "--max-tokens", 40], ["--max-tokens", "found --batching continuous"]),
        (["--batching", "dynamic", "--max-tokens", 10], ["prompt 1: needs 11 tokens", "max_tokens allows 10"]),
        (["--batching", "dynamic", "--max-tokens", 1], ["max_tokens: expected at least 2", "found 1"]),
    ],
)
def test_options_that_cannot_be_used_are_one_line(small, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(small.compare(*options), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "argument --max-new-tokens: expected a whole number from 1, found '0'"),
        (["--max-new-tokens", "many"], "expected a whole number from 1, found 'many'"),
        (["--batch-size", "-1"], "argument --batch-size: expected"),
        (["--runtime", "abacus"], "argument --runtime: expected ort-cpu"),
        (["--runtime", "abacus"], "found 'abacus'; or openai, without CANDIDATE"),
        (["--batching", "elastic"], "argument --batching: invalid choice: 'elastic'"),
        (["--batching", "dynamic", "--max-tokens", "0"], "argument --max-tokens: expected"),
        (["--cache", "maybe"], "argument --cache: invalid choice: 'maybe'"),
        (["--expect", "float8"], "--expect: 'float8': nothing has this name; did you mean float32 or float16 or "),
        (["--expect", "?"], "--expect: '?': nothing has this name; expected auto, or names joined by + of float32, "),
        (["--prompt", "a"], "argument --prompt: not allowed with argument --prompts"),
        (["--reference", "a", "--save-reference", "b"], "not allowed with argument --reference"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_usage_ends_with_2_and_says_which_option(small, options, message):
    done = small.compare(*options)
    assert (done.code, done.out) == (2, "")
    assert message in done.err.splitlines()[-1]


def test_a_model_without_its_candidate_is_refused(small):
    assert_refused(verify("compare", small.checkpoint), "expected MODEL and CANDIDATE, or neither; found MODEL alone")


def test_an_empty_prompt_on_the_command_line_is_refused(tiny, clean):
    done = verify("compare", tiny.path, clean, "--prompt", "Today", "--prompt", "")
    assert_refused(done, "prompt: expected some text, found an empty one")


def test_a_name_that_is_neither_a_path_nor_on_the_hub_is_refused_without_asking_the_network(small, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused(verify("compare", "nobody/nothing", small.export), "nobody/nothing")


def test_options_of_a_device_that_is_not_there_end_without_a_verdict(small):
    done = verify(
        *("compare", small.checkpoint, small.export, "--prompts", small.prompts, "--max-new-tokens", 2),
        *("--provider-option", "device_type=GPU.77"),
    )
    assert done.code == 3
    assert done.first_lines[0].startswith("no-verdict: ")
    assert "OpenVINOExecutionProvider does not accept" in done.first_lines[1]
    assert "device_type=GPU.77" in done.first_lines[1]


def test_a_runtime_that_cannot_be_opened_does_not_take_the_others_report_away(small):
    done = small.compare("--runtime", "ort-openvino", "--provider-option", "device_type=GPU.77", "--json", "-")
    cells = json.loads(done.out)["cells"]
    assert [(cell["runtime"], cell["verdict"]) for cell in cells] == [
        ("ort-cpu", "equal"),
        ("ort-cpu", "equal"),
        ("ort-openvino", "no-verdict"),
        ("ort-openvino", "no-verdict"),
    ]
    assert done.code == 3


@pytest.mark.parametrize(
    ("missing", "extra"), [("onnxruntime", "onnxruntime"), ("onnx", "onnxruntime"), ("transformers", "tokenizer")]
)
def test_a_package_that_is_not_installed_is_named_with_the_extra_to_install(tiny, clean, tmp_path, missing, extra):
    (tmp_path / f"{missing}.py").write_text("raise ImportError('not here')", encoding="utf-8")
    done = verify_elsewhere(
        *("compare", tiny.path, clean, "--prompt", "Today", "--max-new-tokens", 1, "--runtime", "ort-cpu"),
        before=f"sys.path.insert(0, {str(tmp_path)!r})",  # for the process that it starts too
    )
    assert done.code == (2 if missing == "transformers" else 3)
    assert extra in done.out + done.err
    assert "install" in done.out + done.err
    assert "Traceback" not in done.out + done.err


def test_inspect_refuses_what_is_no_export_and_names_what_is_missing(small, tmp_path):
    assert_refused(verify("inspect", small.checkpoint), "expected an export", "found a checkpoint")
    assert_refused(verify("inspect", tmp_path / "gone"), "gone: no such file or directory")
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')", encoding="utf-8")
    hidden = f"sys.path.insert(0, {str(tmp_path)!r})"  # for the process that it starts too
    done = verify_elsewhere("inspect", small.export, "--runtime", "ort-cpu", before=hidden)
    assert_refused(done, "onnxruntime cannot be imported", 'pip install "tokenproof[onnxruntime]"', code=3)


def test_export_refuses_bad_input_and_leaves_what_was_there(copy, tmp_path):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    weights_that_are_nan(copy)
    assert_refused(verify("export", copy.checkpoint, out), "model.layers.2.self_attn.k_proj.weight", "NaN")
    assert_refused(verify("export", copy.checkpoint, tmp_path / "nowhere" / "out.onnx"), "no such directory")
    assert_refused(verify("export", copy.checkpoint, tmp_path / "out.bin"), "ends in .onnx")
    assert_refused(verify("export", tmp_path / "gone", out), "gone: no such file or directory")
    assert out.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "out.onnx"}


def test_export_without_the_onnx_package_names_the_extra_to_install(small, tmp_path):
    done = verify_elsewhere("export", small.checkpoint, tmp_path / "out.onnx", before="sys.modules['onnx'] = None")
    assert_refused(done, "an export needs the onnx package; install the export extra")
    assert not list(tmp_path.iterdir())
