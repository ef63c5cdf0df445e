"""Comparisons in each batching: honest exports are equal, and what fails in a ragged batch alone is found."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.verify import faulty
from tests.verify.comparing import Compared
from tests.verify.faulty import write_faulty
from tests.verify.fields import check_fields
from verify.request import Request, not_revealed, notes_on, request_for
from verify.schedule import SCHEDULES

FROZEN = Path(__file__).parents[2] / "fixtures" / "exports"
BATCHINGS: dict[str, dict[str, Any]] = {
    "static": {"batching": "static", "batch_size": 2},
    "dynamic": {"batching": "dynamic", "max_tokens": 60},
    "continuous": {"batching": "continuous", "batch_size": 2},
}
EQUAL = {"off": "equal", "on": "equal"}


@pytest.fixture(scope="module")
def one_length(compared) -> Compared:
    """Prompts of one length, so that static batches need no padding."""
    return Compared(compared.checkpoint, [[*compared.prompts[0][start:][:12]] for start in range(3)], 8)


def verdicts(compared: Compared, path: Path, **request: Any) -> dict[str, str]:
    return {mode: cell.verdict for mode, cell in compared.cells(path, **request).items()}


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize(
    ("exporter", "runtime"), [("optimum", "ort-cpu"), ("dynamo", "ort-cpu"), ("optimum", "ort-openvino")]
)
def test_exports_that_others_made_are_equal_in_every_batching(compared, exporter, runtime, batching):
    cells = compared.cells(FROZEN / exporter, runtime, **BATCHINGS[batching])
    for cell in cells.values():
        assert (cell.verdict, cell.tokens.equal, cell.batching) == ("equal", 24, batching)
        assert len(cell.noise_ratio.cache) == 2 * 12
        assert cell.noise_ratio.cache_beyond == ()
    assert cells.keys() == {"off", "on"}


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        # Without the cache a row's positions are all shifted alike, which turns queries and keys by the same angle.
        ({"rope_table": faulty.positions_of_row_0}, {"off": "equal", "on": "mismatch"}),
        ({"attention_mask": faulty.mask_of_row_0}, {"off": "drift|mismatch", "on": "drift|mismatch"}),
    ],
    ids=["positions", "mask"],
)
def test_an_export_that_takes_the_first_row_for_all_fails_in_a_continuous_batch_alone(
    tiny, one_length, tmp_path, fault, found
):
    path = write_faulty(tiny, tmp_path / "model.onnx", modules=fault)
    for batching in ("static", "dynamic"):
        assert verdicts(one_length, path, batching=batching) == EQUAL
    for mode, verdict in verdicts(one_length, path, batching="continuous").items():
        assert verdict in found[mode].split("|"), mode


def test_static_batches_of_one_length_do_not_reveal_what_a_continuous_batch_does(tiny, one_length):
    requests = {batching: Request(one_length.prompts, 8, batching=batching) for batching in SCHEDULES}
    hidden = {
        batching: any(line.startswith("padding-unmasked") for line in not_revealed(tiny.config, asked, asked.is_padded))
        for batching, asked in requests.items()
    }
    assert hidden == {"static": True, "dynamic": True, "continuous": False}


@pytest.mark.parametrize("batching", ["dynamic", "continuous"])
def test_an_export_that_cannot_be_padded_is_run_one_by_one_and_the_report_says_so(compared, batching):
    request = Request(compared.prompts, 8, batching=batching)
    (note,) = notes_on(compared.open(FROZEN / "genai"), request)
    assert note == "ort-cpu: the export cannot be told of left padding, so its prompts were run one by one"
    for cell in compared.cells(FROZEN / "genai", batching=batching).values():
        assert (cell.verdict, cell.batching, cell.batch_size) == ("equal", "static", 1)


def test_an_export_that_cannot_be_padded_joins_no_running_batch_even_with_prompts_of_one_length(one_length):
    genai = one_length.open(FROZEN / "genai")
    assert request_for(genai, Request(one_length.prompts, 8)).most_rows == 3
    met = request_for(genai, Request(one_length.prompts, 8, batching="continuous"))
    assert (met.batching, met.most_rows, met.is_padded) == ("static", 1, False)
    one = Request(one_length.prompts, 8, batching="continuous", batch_size=1)
    assert request_for(genai, one) == one


def test_an_export_of_a_fixed_number_of_rows_is_run_in_static_batches_and_the_report_says_so(compared, tmp_path):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", edit=faulty.take_two_rows)
    candidate = compared.open(path)
    asked = Request(compared.prompts, 8, batching="continuous", batch_size=2)
    met = request_for(candidate, asked)
    assert (met.batching, met.most_rows) == ("static", 2)
    (note,) = notes_on(candidate, asked)
    assert note.endswith("takes 2 rows at a time and no other number, so it was run in static batches of as many")
    (note,) = notes_on(candidate, Request(compared.prompts, 8))
    assert note.endswith("takes 2 rows at a time and no other number")
    assert notes_on(candidate, Request(compared.prompts, 8, batch_size=2)) == []


@pytest.mark.parametrize("batching", BATCHINGS)
def test_the_command_compares_in_the_batching_asked_for_and_the_report_says_which(small, batching):
    more = {"static": (), "dynamic": ("--max-tokens", 22), "continuous": ()}[batching]
    done = small.compare("--batching", batching, "--batch-size", 2, "--json", "-", *more)
    report = json.loads(done.out)
    check_fields(report)
    assert (done.code, report["verdict"]) == (0, "equal")
    assert [(cell["cache"], cell["batching"], cell["batch_size"]) for cell in report["cells"]] == [
        (mode, batching, 2) for mode in ("off", "on")
    ]
    assert [cell["tokens"]["equal"] for cell in report["cells"]] == [12, 12]
    kind = "" if batching == "static" else f" in {batching} batches"
    (line,) = [line for line in done.err.splitlines() if line.startswith("prompts ")]
    assert line.split(maxsplit=1)[1].strip() == f"3, 4 new tokens each, 2 at a time{kind}"
