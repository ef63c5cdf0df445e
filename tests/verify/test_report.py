"""The report of a result: its first three lines, its table, and the same as JSON."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from tests.verify.commands import table_of
from tests.verify.fields import check_fields
from verify.report.as_json import as_json
from verify.report.console import print_facts, print_report
from verify.report.result import (
    CauseFound,
    Cell,
    Diagnosis,
    Exported,
    FirstMismatch,
    Model,
    NoiseRatio,
    Report,
    Residual,
    Seconds,
    Tokens,
    Worst,
)

FLIP = FirstMismatch(row=2, step=12, expected=314, actual=253, margin=0.8125)


def noise(logits: float = 1.07, worst: float = 2.5) -> NoiseRatio:
    place = Worst("lm_head", 0, 17, worst)
    return NoiseRatio(logits, 2.29, place, 4.71, {"layers.3.self_attn.k_cache": 1.6}, (), place)


def cell(
    runtime: str = "ort-openvino",
    cache: str = "on",
    verdict: str = "equal",
    ratio: NoiseRatio | None = None,
    first: FirstMismatch | None = None,
    ties: int = 0,
) -> Cell:
    providers = {"OpenVINOExecutionProvider": {"nodes": 748}, "CPUExecutionProvider": {"nodes": 0}}
    tokens = Tokens(512, 512 - ties - (first is not None), ties, first)
    settings = {"requested": {}, "effective": {"providers": providers}}
    return Cell(runtime, cache, settings, verdict, "static", 8, tokens, ratio or noise(), Seconds(123.45, 0.6))


def without_verdict(reason: str, runtime: str = "ort-openvino") -> Cell:
    return Cell(runtime, "off", {"requested": {}, "effective": {}}, "no-verdict", "static", 8, reason=reason)


def report(*cells: Cell, path: str = "models/tiny", **more: tuple[str, ...]) -> Report:
    model, candidate = Model(path, "llama", "ab" * 32), Exported(f"{path}.onnx", "exporter 1.0", "cd" * 32)
    return Report(model, candidate, 8, 64, cells or (cell(),), **more)


def printed(shown: Report, width: int = 80, **console: bool) -> str:
    out = io.StringIO()
    print_report(shown, Console(file=out, width=width, **console))
    return out.getvalue()


def first_lines(shown: Report) -> list[str]:
    return printed(shown).splitlines()[:3]


def test_all_equal_is_said_with_how_much_was_compared():
    verdict, cause, to_do = first_lines(report(cell(cache="off"), cell(ties=3)))
    assert verdict == (
        "equal: all 1024 tokens of 2 runs are the checkpoint's (3 of them ties within the noise), "
        "and the logits are honest float32"
    )
    assert (cause, to_do) == ("cause: none to look for", "to do: nothing")


def test_a_wrong_cache_that_nobody_read_is_pointed_out_beside_the_verdict():
    wrong = replace(noise(), cache={"layers.3.self_attn.k_cache": 5.7e7}, cache_beyond=("layers.3.self_attn.k_cache",))
    text = printed(report(cell(cache="off", ratio=wrong)))
    assert text.startswith("equal: ")
    assert "ort-openvino, cache off: the logits are right, but 1 of 1 present.* outputs are not" in text
    assert "present.*" not in printed(report(cell(cache="on", verdict="mismatch", ratio=wrong, first=FLIP)))


def test_a_cache_that_was_read_and_is_further_off_is_not_said_to_lead_astray():
    coarse = replace(noise(), cache={"layers.0.self_attn.k_cache": 8.5}, cache_beyond=("layers.0.self_attn.k_cache",))
    text = printed(report(replace(cell(cache="on", ratio=coarse), expect="float16")))
    assert "present.*" not in text
    assert (
        "ort-openvino, cache on: the logits are right, but 1 of 1 keys and values of its layers are further off than "
        "float16 explains" in text
    )


def test_drift_of_the_cache_alone_is_said_to_be_that():
    coarse = replace(noise(), cache={"layers.0.self_attn.k_cache": 8.5}, cache_beyond=("layers.0.self_attn.k_cache",))
    shown = report(replace(cell(cache="on", verdict="drift", ratio=coarse), expect="bfloat16"))
    assert first_lines(shown)[0] == (
        "drift: every token is right, but keys and values are further off than bfloat16 explains, on ort-openvino with "
        "cache on"
    )
    assert "1 of 1 keys and values of its layers are further off than bfloat16 explains" in printed(shown)


def test_drift_and_mismatch_say_what_they_were_held_against_and_that_ties_are_no_fault():
    verdict, *_ = first_lines(report(replace(cell(verdict="drift", ties=2), expect="int4-weights+float16")))
    assert verdict == (
        "drift: every token is right (2 of them ties within the noise), but the logits are further off than "
        "int4-weights+float16 explains, on ort-openvino with cache on"
    )
    verdict, *_ = first_lines(report(replace(cell(verdict="mismatch", first=FLIP), expect="bfloat16")))
    assert verdict == "mismatch: tokens differ that bfloat16 noise cannot explain, on ort-openvino with cache on"


def test_drift_and_mismatch_name_the_runs_that_have_them_and_no_others():
    shown = report(
        cell("ort-cpu", "off"), cell("ort-cpu", "on", "drift"), cell("ort-openvino", "on", "mismatch", first=FLIP)
    )
    verdict, cause, to_do = first_lines(shown)
    assert verdict == "mismatch: tokens differ that float32 noise cannot explain, on ort-openvino with cache on"
    assert cause == "cause: not looked for"
    assert to_do.startswith("to do: ")
    verdict, *_ = first_lines(report(cell("ort-cpu", "off"), cell("ort-cpu", "on", "drift")))
    assert verdict.startswith("drift: every token is right")
    assert verdict.endswith("on ort-cpu with cache on")


def test_what_to_do_points_to_the_side_that_the_runs_show_to_be_wrong():
    wrong = [cell("ort-openvino", mode, "mismatch", first=FLIP) for mode in ("off", "on")]
    on_cpu = [cell("ort-cpu", mode) for mode in ("off", "on")]
    wrong_on_cpu = [replace(each, runtime="ort-cpu") for each in wrong]
    for cells, advice in (
        (wrong, "compare with --runtime ort-cpu too"),
        ([cell(cache="off"), wrong[1]], "look at the cache first"),
        ([*on_cpu, *wrong], "look at the provider"),
        ([*wrong_on_cpu, *wrong], "look at the export"),
        (wrong_on_cpu, "look at the export"),
    ):
        assert advice in first_lines(report(*cells))[2], advice


def test_the_reason_for_no_verdict_is_the_cause():
    verdict, cause, _ = first_lines(report(without_verdict("model.onnx: ort-openvino failed: Got: 9 Expected: 3")))
    assert verdict == "no-verdict: the candidate could not be run to the end, on ort-openvino with cache off"
    assert cause == "cause: model.onnx: ort-openvino failed: Got: 9 Expected: 3"


def test_a_reason_that_one_run_had_no_verdict_is_not_the_cause_of_another_runs_mismatch():
    shown = report(without_verdict("not installed", "ort-cpu"), cell(verdict="mismatch", first=FLIP))
    assert "not installed" not in first_lines(shown)[1]
    assert "ort-cpu, cache off: not installed" in printed(shown)


def test_why_no_cause_could_be_tried_is_the_cause_and_said_once():
    why = "logits are NaN or infinite from row 0, position 3 on"
    drift = report(cell(verdict="drift"), diagnosed=Diagnosis("unexplained", notes=(why, "and more"), untried=why))
    assert first_lines(drift)[1] == f"cause: not known: {why}"
    assert printed(drift).count(why) == 1
    assert json.loads(as_json(drift))["diagnosis_notes"] == [why, "and more"]
    assert "and more" in printed(drift)


@pytest.mark.parametrize("left", [math.nan, math.inf, 99.0])
def test_what_leaves_all_or_what_is_not_a_number_is_no_hint(left):
    tried = (CauseFound("bos-missing", {}, None, Residual(99.0, left), "ruled-out"),)
    drift = report(cell(verdict="drift"), diagnosed=Diagnosis("unexplained", tried))
    assert first_lines(drift)[1] == "cause: not known: no cause of the catalogue explains a tenth of it"


def test_the_first_mismatch_is_shown_with_its_place_and_margin():
    assert (
        "first mismatch in row 2 at step 12: expected token 314, found 253, which the reference gives 0.812 less"
        in printed(report(cell(verdict="mismatch", first=FLIP)))
    )


@pytest.mark.parametrize("paths", ["models/tiny", "/a/very/long/path" * 9, "/with[bold]brackets[/]"])
def test_the_first_three_lines_are_one_line_each_whatever_they_hold(paths):
    shown = report(without_verdict(f"{paths}: failed"), path=paths)
    lines = first_lines(shown)
    assert [line.partition(":")[0] for line in lines] == ["no-verdict", "cause", "to do"]
    assert lines[1] == f"cause: {paths}: failed"


def test_the_table_fits_80_columns_and_cuts_nothing():
    large = noise(logits=456_789.0, worst=1_234_567.0)
    cells = [
        cell("ort-openvino", "off"),
        cell("ort-openvino", "on", "mismatch", large, FLIP),
        cell("transformers", "on", "drift", noise(math.nan, math.inf)),
        without_verdict("why"),
    ]
    heading, *rows = table_of(printed(report(*cells)).splitlines())
    assert max(map(len, (heading, *rows))) <= 80
    assert "…" not in heading + "".join(rows)
    first, second, third, fourth = (row.split() for row in rows)
    assert first == ["ort-openvino", "off", "equal", "512/512", "1.07", "(2.29)", "2.5", "(4.71)", "123.5"]
    assert second[:4] == ["ort-openvino", "on", "mismatch", "511/512"]
    assert second[-1] == "123.5"
    assert {"(2.29)", "(4.71)"} <= set(second)
    assert third[4:8] == ["nan", "(2.29)", "inf", "(4.71)"]
    assert fourth == ["ort-openvino", "off", "no-verdict"]


def test_figures_come_after_and_say_who_ran_what_and_what_was_not_revealed():
    shown = report(cell(), notes=("ort-openvino: its prompts were run one by one",), not_revealed=("rope: too short",))
    text = printed(shown)
    for words in (
        "models/tiny (llama, sha256 abababababab)",
        "models/tiny.onnx (exporter 1.0, sha256 cdcdcdcdcdcd)",
        "8, 64 new tokens each",
        "ort-openvino, cache on: of the cache, layers.3.self_attn.k_cache is noisiest: 1.6",
        "ort-openvino, cache on: OpenVINOExecutionProvider ran 748 nodes",
        "note: ort-openvino: its prompts were run one by one",
        "not revealed: rope: too short",
    ):
        assert words in text
    assert "CPUExecutionProvider" not in text  # it ran none


def test_how_many_rows_were_decoded_at_a_time_is_said_with_their_batching_unless_it_is_static():
    dynamic, continuous = (replace(cell(), batching=batching) for batching in ("dynamic", "continuous"))
    one = replace(cell(), batch_size=1)
    for cells, words in (
        ([cell()], "8, 64 new tokens each, 8 at a time"),
        ([dynamic, dynamic], "8, 64 new tokens each, 8 at a time in dynamic batches"),
        ([continuous, one], "8, 64 new tokens each, 1 at a time or 8 at a time in continuous batches"),
    ):
        (line,) = [line for line in printed(report(*cells), width=99).splitlines() if line.startswith("prompts ")]
        assert line.removeprefix("prompts").strip() == words


def test_colours_are_for_terminals_alone():
    assert "\x1b" not in printed(report())
    assert "\x1b[" in printed(report(), force_terminal=True)


def test_brackets_in_facts_are_text():
    out = io.StringIO()
    print_facts([("inputs", "input_ids: int64 [batch, tokens]\nmask: int64 [bold]")], Console(file=out, width=80))
    assert "input_ids: int64 [batch, tokens]" in out.getvalue()
    assert "mask: int64 [bold]" in out.getvalue()


@pytest.mark.parametrize(
    "cells",
    [
        (cell(),),
        (cell(verdict="drift"), cell("ort-cpu", "off", "mismatch", first=FLIP)),
        (cell(), without_verdict("not installed")),
        (cell(verdict="drift", ratio=noise(math.nan, math.inf)),),
    ],
    ids=["equal", "mismatch", "no-verdict", "not-finite"],
)
def test_json_has_every_field_and_its_verdict_is_the_reports(cells):
    shown = report(*cells, not_revealed=("rope: too short",))
    text = as_json(shown)
    assert text.endswith("}\n")
    found = json.loads(text)
    check_fields(found)
    assert list(found)[:3] == ["schema", "verdict", "model"]
    assert found["verdict"] == shown.verdict
    assert found["not_revealed"] == ["rope: too short"]
    assert found["diagnosis"] == ("unexplained" if shown.exit_code == 1 else "none")


def test_json_writes_what_is_not_finite_as_strings_and_so_stays_json():
    ratio = replace(noise(math.nan, math.inf), cache={"layers.0.self_attn.v_cache": -math.inf})
    text = as_json(report(cell(verdict="drift", ratio=ratio)))
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["cells"][0]["noise_ratio"]
    assert (found["logits"], found["worst"]["ratio"]) == ("nan", "inf")
    assert found["cache"] == {"layers.0.self_attn.v_cache": "-inf"}


def test_json_shows_the_first_mismatch_or_null():
    tokens = [
        each["tokens"] for each in json.loads(as_json(report(cell(verdict="mismatch", first=FLIP), cell())))["cells"]
    ]
    first = {"row": 2, "step": 12, "expected": 314, "actual": 253, "margin": 0.8125}
    assert [each["first_mismatch"] for each in tokens] == [first, None]
