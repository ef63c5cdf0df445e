"""The command line: what goes where, exit codes, and what each verb does when all is well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from refengine.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.verify.commands import environment, table_of, verify, verify_elsewhere
from tests.verify.faulty import changed_weight, write_faulty
from tests.verify.fields import check_fields
from tests.verify.handmade import N, repeating_decoder
from verify.candidates.onnx_file import describe

EXPORTS = Path(__file__).parents[2] / "fixtures" / "exports"


@pytest.fixture(scope="module")
def drifting(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("drifting") / "model.onnx"
    return write_faulty(open_checkpoint(small.checkpoint), path, config={"rms_norm_eps": 1.4e-5})


@pytest.fixture(scope="module")
def nan(small, tmp_path_factory):
    """An export whose every logit of token 50 is NaN."""

    def spoil(weight_DV: np.ndarray) -> np.ndarray:
        weight_DV[:, 50] = np.nan
        return weight_DV

    path = tmp_path_factory.mktemp("nan") / "model.onnx"
    return write_faulty(open_checkpoint(small.checkpoint), path, read=changed_weight("lm_head.weight.T", spoil))


def test_an_equal_export_ends_with_0_and_says_so_first(small):
    done = small.compare()
    assert done.code == 0
    assert done.err == ""
    verdict, cause, to_do = done.first_lines
    assert verdict.startswith("equal: all 24 tokens of 2 runs are the checkpoint's")
    assert (cause, to_do) == ("cause: none to look for", "to do: nothing")


def test_drift_ends_with_1(small, drifting):
    done = small.compare(candidate=drifting)
    assert done.code == 1
    assert done.first_lines[0].startswith("drift: every token is right, but the logits are further off")
    assert "ort-cpu with cache off, ort-cpu with cache on" in done.first_lines[0]


def test_a_mismatch_ends_with_1_and_shows_the_first_token_that_differs(small, nan):
    done = small.compare(candidate=nan)
    assert done.code == 1
    assert done.first_lines[0].startswith("mismatch: tokens differ")
    assert "first mismatch in row 0 at step 0: expected token" in done.out
    assert "found 50" in done.out


def test_no_verdict_ends_with_3_and_gives_the_reason_as_the_cause(small, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "one_layer", num_hidden_layers=1)
    path = repeating_decoder(tmp_path / "model.onnx", heads=N, kv_heads="kv_heads")
    quick = ("--runtime", "ort-cpu", "--cache", "on", "--max-new-tokens", 2, "--prompts", small.prompts)
    done = verify("compare", checkpoint, path, *quick)
    assert done.code == 3
    verdict, cause, to_do = done.first_lines
    assert verdict.startswith("no-verdict: the candidate could not be run to the end")
    assert "6 is num_attention_heads and 2 num_key_value_heads: its past was built with" in cause
    assert to_do.startswith("to do: ")
    assert "Traceback" not in done.out + done.err


@pytest.mark.parametrize("kind", ["equal", "drift", "mismatch"])
def test_json_on_standard_output_stands_there_alone_with_every_field(small, drifting, nan, kind):
    done = small.compare("--json", "-", candidate={"equal": None, "drift": drifting, "mismatch": nan}[kind])
    report = json.loads(done.out)
    check_fields(report)
    assert (report["verdict"], done.code) == (kind, 0 if kind == "equal" else 1)
    assert [(cell["runtime"], cell["cache"]) for cell in report["cells"]] == [("ort-cpu", "off"), ("ort-cpu", "on")]
    assert {cell["tokens"]["compared"] for cell in report["cells"]} == {12}
    assert report["model"] == {
        "path": str(small.checkpoint),
        "model_type": "llama",
        "sha256": report["model"]["sha256"],
    }
    assert report["candidate"]["exporter"] == "verify"
    explained = {"equal": ("none", []), "drift": ("named", ["norm-eps"]), "mismatch": ("unexplained", [])}
    confirmed = [cause["name"] for cause in report["causes"] if cause["status"] == "confirmed"]
    assert (report["diagnosis"], confirmed) == explained[kind]
    assert done.err.startswith(f"{kind}: ")  # a person who waits sees the report all the same


def test_numbers_that_are_not_finite_are_strings_in_json(small, nan):
    (cell,) = json.loads(small.compare("--json", "-", "--cache", "off", candidate=nan).out)["cells"]
    assert (cell["noise_ratio"]["logits"], cell["noise_ratio"]["worst"]["ratio"]) == ("nan", "nan")
    assert set(cell["tokens"]["first_mismatch"]) >= {"row", "step", "expected", "actual", "margin"}


def test_json_in_a_file_stands_beside_the_report_on_the_console(small, tmp_path):
    file = tmp_path / "report.json"
    file.write_text("old")
    done = small.compare("--json", file)
    assert done.first_lines[0].startswith("equal: ")
    check_fields(json.loads(file.read_text(encoding="utf-8")))
    assert os.listdir(tmp_path) == ["report.json"]


def test_the_sha256_is_of_the_files_that_were_compared(small):
    report = json.loads(small.compare("--json", "-", "--cache", "off").out)
    assert report["candidate"]["sha256"] == describe(small.export).sha256
    again = json.loads(small.compare("--json", "-", "--cache", "off").out)
    assert again["model"]["sha256"] == report["model"]["sha256"] != report["candidate"]["sha256"]


@pytest.mark.parametrize(("given", "modes"), [("on", ["on"]), ("off", ["off"]), ("both", ["off", "on"])])
def test_the_cache_modes_asked_for_are_those_compared(small, given, modes):
    report = json.loads(small.compare("--json", "-", "--cache", given).out)
    assert [cell["cache"] for cell in report["cells"]] == modes


def test_runtimes_are_compared_in_the_order_asked_for_and_say_who_ran_what(small):
    done = small.compare("--runtime", "ort-openvino", "--json", "-", "--cache", "on")
    cells = json.loads(done.out)["cells"]
    assert [cell["runtime"] for cell in cells] == ["ort-cpu", "ort-openvino"]
    for cell, provider in zip(cells, ("CPUExecutionProvider", "OpenVINOExecutionProvider"), strict=True):
        assert cell["settings"]["effective"]["providers"][provider]["nodes"] > 100
    assert "OpenVINOExecutionProvider ran" in done.err


def test_provider_options_reach_the_runtime_unchanged(small):
    options = ("--provider-option", "device_type=CPU", "--provider-option", "precision=FP32")
    (cell,) = json.loads(
        verify(
            *("compare", small.checkpoint, small.export, "--prompts", small.prompts, "--max-new-tokens", 2),
            *("--cache", "on", "--json", "-", *options),
        ).out
    )["cells"]
    assert cell["runtime"] == "ort-openvino"  # by default
    assert cell["settings"]["requested"].items() >= {"device_type": "CPU", "precision": "FP32"}.items()


def test_a_batch_size_is_kept_to(small):
    report = json.loads(small.compare("--json", "-", "--batch-size", 2).out)
    assert {cell["batch_size"] for cell in report["cells"]} == {2}
    assert report["verdict"] == "equal"


def test_a_saved_reference_gives_the_same_report_again_and_is_refused_elsewhere(small, drifting, tmp_path):
    file = tmp_path / "reference.npz"
    first = small.compare("--save-reference", file, "--json", "-")
    again = small.compare("--reference", file, "--json", "-")
    reports = [json.loads(done.out) for done in (first, again)]
    for report in reports:
        for cell in report["cells"]:
            del cell["seconds"], cell["peak_memory_bytes"]
    assert reports[0] == reports[1]
    assert small.compare("--reference", file, candidate=drifting).code == 1
    refused = small.compare("--reference", file, "--max-new-tokens", 5)
    assert (refused.code, refused.out) == (2, "")
    assert "made with --max-new-tokens 4, asked for 5" in refused.err


def test_without_arguments_the_embedded_model_is_compared_on_openvino(tmp_path):
    done = verify_elsewhere("compare", "--max-new-tokens", 2, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.first_lines[0].startswith("equal: all 32 tokens of 2 runs")
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    heading, *cells = table_of(lines)
    assert heading.split()[:3] == ["runtime", "cache", "verdict"]
    assert [line.split()[:3] for line in cells] == [["ort-openvino", mode, "equal"] for mode in ("off", "on")]
    assert max(map(len, (heading, *cells))) <= 80
    assert "not revealed" not in done.out
    assert not list(tmp_path.iterdir())


def test_progress_is_drawn_on_a_terminal_and_never_on_standard_output(small):
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "verify", "compare", small.checkpoint, small.export, "--runtime", "ort-cpu"]
    with (
        open(parent, "rb", buffering=0) as terminal,
        subprocess.Popen(
            [*map(str, command), "--prompts", str(small.prompts), "--max-new-tokens", "4"],
            stdout=subprocess.PIPE,
            stderr=child,
            env=environment() | {"TERM": "xterm"},
        ) as process,
    ):
        os.close(child)
        drawn = b""
        try:
            while piece := terminal.read(65536):
                drawn += piece
        except OSError:
            pass  # how Linux says that the other end has been closed
        out = process.stdout.read()
    assert process.returncode == 0
    assert b"\x1b" in drawn
    assert b"ort-cpu" in drawn
    assert out.startswith(b"equal: ")
    assert b"\x1b" not in out


def test_inspect_shows_what_an_export_is():
    done = verify("inspect", EXPORTS / "genai")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    for words in ("onnxruntime-genai", "GroupQueryAttention", "past_key_values.11.value", "yes, float32"):
        assert words in done.out
    shown = {line.split("  ")[0]: line.split()[-1] for line in done.out.splitlines() if line[:1].strip()}
    expected = {"layers": "12", "query heads": "6", "KV heads": "2", "head size": "open", "vocabulary": "384"}
    assert {heading: shown[heading] for heading in expected} == expected


def test_inspect_with_a_runtime_shows_who_runs_what(small):
    done = verify("inspect", small.export, "--runtime", "ort-cpu")
    assert done.code == 0
    assert "CPUExecutionProvider runs" in done.out
    assert "who runs what" not in verify("inspect", small.export).out


def test_export_writes_what_compares_equal_and_says_so_on_standard_error(small, tmp_path):
    out = tmp_path / "written.onnx"
    done = verify("export", small.checkpoint, out)
    assert (done.code, done.out) == (0, "")
    assert str(out) in done.err
    onnx.checker.check_model(out)
    assert small.compare(candidate=out).code == 0


def test_help_is_an_answer_and_no_verb_is_bad_usage():
    assert verify("--help").code == verify("compare", "--help").code == 0
    assert verify().code == 2


def test_a_reader_who_leaves_early_gets_no_traceback_and_the_verdict_still(small, drifting):
    """Standard output is a pipe that nobody reads."""
    for candidate, code in ((small.export, 0), (drifting, 1)):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "verify", "compare", small.checkpoint, candidate, "--runtime", "ort-cpu"]
        command += ["--prompts", small.prompts, "--max-new-tokens", "2", "--cache", "on"]
        done = subprocess.run(
            list(map(str, command)), stdout=writing, stderr=subprocess.PIPE, env=environment(), check=False
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (code, b"")
