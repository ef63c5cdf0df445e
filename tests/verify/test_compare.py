"""Exports with a known mistake get the verdict that it deserves, in the cells where it shows; honest ones are equal."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refengine.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.verify import faulty
from tests.verify.comparing import Compared, Here, Notes
from tests.verify.faulty import changed_weight, exchanged_layers, only_in, scaled_attention, windowed, write_faulty
from verify.compare import Comparison
from verify.export.modules import MODULES
from verify.report.result import Cell, Exported, Model, Report
from verify.request import Request, not_revealed, notes_on
from verify.truth.reference import Reference

FROZEN = Path(__file__).parents[2] / "fixtures" / "exports"
RUNTIMES = ["ort-cpu", "ort-openvino"]
EQUAL = {"off": "equal", "on": "equal"}
DRIFT = {"off": "drift", "on": "drift"}
MISMATCH = {"off": "mismatch", "on": "mismatch"}
WRONG = {"off": "drift|mismatch", "on": "drift|mismatch"}  # whether a token flips depends on the prompts
CACHE_ONLY = {"off": "equal", "on": "mismatch"}


@dataclass(frozen=True)
class Fault:
    """What `write_faulty` is given, the verdicts by cache mode on a ragged batch, and on one prompt if they differ."""

    verdicts: Mapping[str, str]
    made: Mapping[str, Any] = field(default_factory=dict)
    alone: Mapping[str, str] | None = None


FAULTS = {
    "rms_norm_eps 1e-6 for 1e-5": Fault(DRIFT, {"config": {"rms_norm_eps": 1e-6}}),
    "rms_norm_eps 1e-6 in one layer": Fault(
        DRIFT, {"modules": only_in({5}, "rms_norm", lambda at, x_BTD, eps: MODULES.rms_norm(at, x_BTD, 1e-6))}
    ),
    "attention scale off by 1e-4 in one layer": Fault(
        DRIFT, {"modules": only_in({3}, "attend", scaled_attention(1.0001))}
    ),
    "one weight off by a thousandth": Fault(
        DRIFT, {"read": changed_weight("model.layers.4.self_attn.o_proj.weight.T", lambda weight_IO: 1.001 * weight_IO)}
    ),
    "interleaved rope": Fault(MISMATCH, {"modules": {"rotate": faulty.interleaved_rotation}}),
    "interleaved rope in one layer": Fault(WRONG, {"modules": only_in({7}, "rotate", faulty.interleaved_rotation)}),
    "sliding window of 16": Fault(WRONG, {"modules": {"attention_mask": windowed(16)}}),
    "KV heads tiled": Fault(MISMATCH, {"modules": {"repeat_kv": faulty.tiled_heads}}),
    "KV heads tiled in the last layer": Fault(WRONG, {"modules": only_in({11}, "repeat_kv", faulty.tiled_heads)}),
    "mask not causal": Fault(WRONG, {"modules": {"attention_mask": faulty.mask_not_causal}}),
    "two layers exchanged": Fault(WRONG, {"read": exchanged_layers(4, 5)}),
    "keys and values swapped in the cache": Fault(CACHE_ONLY, {"edit": faulty.swap_keys_and_values_given}),
    "layers of the cache in the order of text": Fault(CACHE_ONLY, {"edit": faulty.give_layers_in_order_of_text}),
    "positions that ignore padding": Fault(
        CACHE_ONLY, {"modules": {"rope_table": faulty.positions_by_slot_then_by_count}}, alone=EQUAL
    ),
    "a logit that is NaN": Fault(
        MISMATCH,
        {
            "read": changed_weight(
                "lm_head.weight.T", lambda w_DV: np.where(np.arange(w_DV.shape[1]) == 300, np.nan, w_DV)
            )
        },
    ),
}


def report_of(cells: Mapping[str, Cell], of: Compared) -> Report:
    subject = Model("model", "llama", "a" * 64), Exported("candidate", "verify", "b" * 64)
    return Report(*subject, len(of.prompts), of.max_new_tokens, tuple(cells.values()))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_gets_its_verdict_in_the_cells_where_it_shows(tiny, compared, alone, tmp_path, name):
    fault = FAULTS[name]
    path = write_faulty(tiny, tmp_path / "model.onnx", **fault.made)
    cells = compared.cells(path)
    for mode, cell in cells.items():
        assert cell.verdict in fault.verdicts[mode].split("|"), mode
    for mode, cell in alone.cells(path).items():
        assert cell.verdict in (fault.alone or fault.verdicts)[mode].split("|"), mode
    report = report_of(cells, compared)
    assert (report.exit_code, report.diagnosis, report.verdict) == (1, "unexplained", cells["on"].verdict)
    for cell in cells.values():
        assert (cell.tokens.first_mismatch is not None) == (cell.verdict == "mismatch")
        assert cell.tokens.compared == 24


def test_a_cache_given_wrongly_is_named_even_where_no_logit_depends_on_it(tiny, compared, clean, tmp_path):
    path = write_faulty(tiny, tmp_path / "model.onnx", edit=faulty.swap_keys_and_values_given)
    wrong = compared.cells(path)["off"]
    assert (wrong.verdict, len(wrong.noise_ratio.cache_beyond)) == ("equal", 2 * 12)
    assert compared.cells(clean)["off"].noise_ratio.cache_beyond == ()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("exporter", ["optimum", "genai", "dynamo"])
def test_exports_that_others_made_are_equal_with_the_cache_and_without(compared, exporter, runtime):
    cells = compared.cells(FROZEN / exporter, runtime)
    assert {mode: cell.verdict for mode, cell in cells.items()} == EQUAL
    for cell in cells.values():
        assert (cell.tokens.compared, cell.tokens.equal) == (24, 24)
        assert cell.batch_size == (1 if exporter == "genai" else 3)
        assert len(cell.noise_ratio.cache) == 2 * 12
        assert cell.noise_ratio.cache_beyond == ()
    assert report_of(cells, compared).exit_code == 0


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_this_projects_own_export_is_equal_in_any_batch(compared, clean, runtime, batch_size):
    cells = compared.cells(clean, runtime, batch_size=batch_size)
    assert {mode: cell.verdict for mode, cell in cells.items()} == EQUAL
    assert {cell.batch_size for cell in cells.values()} == {batch_size or 3}
    assert {cell.runtime for cell in cells.values()} == {runtime}


def test_a_single_early_flip_counts_once(tiny, compared, tmp_path):
    """The candidate chooses token 300 after the first prompt whatever comes; after it, both are fed the same."""
    at = len(compared.prompts[0]) - 1
    path = write_faulty(tiny, tmp_path / "model.onnx", edit=faulty.choose_at_position(at, 300))
    for cell in compared.cells(path).values():
        assert (cell.verdict, cell.tokens.equal, cell.tokens.ties) == ("mismatch", 23, 0)
        first = cell.tokens.first_mismatch
        assert (first.row, first.step, first.actual) == (0, 0, 300)
        assert first.expected == compared.reference.tokens[0][0]
        reference = compared.reference.logits.value64_PX[at]
        assert first.margin == pytest.approx(reference[first.expected] - reference[300])


@pytest.fixture(scope="module")
def rivals(tmp_path_factory) -> Compared:
    """A model that has two tokens with the same logits, and would choose either of them after its first prompt."""
    path = write_checkpoint(tmp_path_factory.mktemp("rivals"))
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]
    chosen = Reference(open_checkpoint(path)).run(prompts, 1).tokens[0][0]
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][(chosen + 1) % 67] = tensors["lm_head.weight"][chosen]
    save_file(tensors, path / "model.safetensors")
    return Compared(open_checkpoint(path), prompts, 4)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1 + 2**-21, "equal"), (1 - 2**-21, "equal"), (1 + 1e-3, "drift")], ids=str
)
def test_of_two_tokens_as_good_as_each_other_either_is_right(rivals, tmp_path, factor, verdict):
    """The export prefers one of the two by a few roundings, or by more, which is another matter."""
    expected = rivals.reference.tokens[0][0]
    logits_V = rivals.reference.logits.value64_PX[len(rivals.prompts[0]) - 1]
    (rival,) = set(np.flatnonzero(np.isclose(logits_V, logits_V.max(), rtol=1e-12))) - {expected}

    def prefer(weight_DV: np.ndarray) -> np.ndarray:
        weight_DV[:, rival] *= np.float32(factor)
        return weight_DV

    reader = changed_weight("lm_head.weight.T", prefer)
    for cell in rivals.cells(write_faulty(rivals.checkpoint, tmp_path / "model.onnx", read=reader)).values():
        tokens = cell.tokens
        assert (cell.verdict, tokens.first_mismatch, tokens.equal + tokens.ties) == (verdict, None, 8)
        assert (tokens.ties > 0) == (factor > 1)


def test_a_run_asks_the_reference_once_for_all_its_cells(tiny, compared, clean):
    progress = Notes()
    comparison = Comparison(tiny, Request(compared.prompts, 2), progress)
    first = comparison.cell(Here(compared.open(clean)), "off")
    (kept,) = comparison.references.made.values()
    second = comparison.cell(Here(compared.open(clean)), "on")
    assert list(comparison.references.made.values()) == [kept]
    assert (first.verdict, second.verdict) == ("equal", "equal")
    assert [what for what, _ in progress.begun].count("reading the checkpoint in float64") == 1
    runs = [(what, steps) for what, steps in progress.begun if what.startswith("ort-cpu")]
    assert runs == [("ort-cpu, cache off", 6), ("ort-cpu, cache on", 6)]
    assert progress.steps == 12


def test_an_export_without_a_cache_is_compared_without_it_and_the_report_says_so(compared, without_cache):
    assert {mode: cell.verdict for mode, cell in compared.cells(without_cache).items()} == {"off": "equal"}
    request = Request(compared.prompts, 8)
    (note,) = notes_on(compared.open(without_cache), request)
    assert "no past_key_values input, so it was compared without a cache only" in note


def test_an_export_without_a_cache_has_no_verdict_where_only_the_cache_is_asked_for(compared, without_cache):
    cells = compared.cells(without_cache, modes=("on",))
    assert {mode: cell.verdict for mode, cell in cells.items()} == {"on": "no-verdict"}
    assert "no past_key_values input; compare it with --cache off" in cells["on"].reason
    assert report_of(cells, compared).exit_code == 3


@pytest.mark.parametrize("runtime", ["ort-cpu", "openvino"])
def test_a_cache_that_cannot_be_carried_on_is_no_hindrance_where_none_is(compared, tmp_path, runtime):
    path = write_faulty(compared.checkpoint, tmp_path / "model.onnx", edit=faulty.give_a_short_present)
    exact = {"INFERENCE_PRECISION_HINT": "f32"} if runtime == "openvino" else {}
    cells = compared.cells(path, runtime, exact)
    assert {mode: cell.verdict for mode, cell in cells.items()} == {"off": "equal", "on": "no-verdict"}
    assert f"{runtime} failed: present.0.key: expected shape" in cells["on"].reason
    assert "cannot be carried on; compare with --cache off" in cells["on"].reason


def test_an_export_that_cannot_be_padded_is_run_one_by_one_and_the_report_says_so(compared, alone):
    candidate = compared.open(FROZEN / "genai")
    (note,) = notes_on(candidate, Request(compared.prompts, 8))
    assert "its prompts were run one by one" in note
    assert notes_on(candidate, Request(alone.prompts, 8)) == []
    assert notes_on(candidate, Request(compared.prompts, 8, batch_size=1)) == []


@pytest.mark.parametrize(
    ("verdicts", "worst", "code"),
    [
        (["equal", "equal"], "equal", 0),
        (["equal", "drift"], "drift", 1),
        (["drift", "mismatch"], "mismatch", 1),
        (["no-verdict", "drift"], "drift", 1),
        (["equal", "no-verdict"], "no-verdict", 3),
        (["no-verdict", "mismatch", "drift", "equal"], "mismatch", 1),
    ],
)
def test_the_verdict_on_all_is_the_worst_and_decides_the_exit_code(compared, verdicts, worst, code):
    cells = {str(place): Cell("ort-cpu", "on", {}, verdict, "static", 1) for place, verdict in enumerate(verdicts)}
    report = report_of(cells, compared)
    assert (report.verdict, report.exit_code) == (worst, code)


def test_what_the_prompts_could_not_have_shown_is_said(tiny):
    config = replace(tiny.config, sliding_window=64, num_hidden_layers=10)

    def hidden(prompts: list[list[int]], new: int, padded: bool = False, **request: Any) -> set[str]:
        said = not_revealed(config, Request(prompts, new, **request), padded)
        return {name for line in said for name in line.partition(":")[0].split(", ")}

    padding = {"padding-unmasked", "positions-ignore-padding"}
    always = {"cache-layer-order"}
    assert hidden([[1]], 1) == always | padding | {"rope", "sliding-window", "cache", "cache-not-reset"}
    assert hidden([[1], [1, 2]], 2, padded=True) == always | {"sliding-window"}
    assert hidden([[1] * 63, [1]], 2, padded=True) == always | {"sliding-window"}
    assert hidden([[1] * 64, [1]], 2, padded=True) == always
    assert hidden([[1] * 64, [1]], 1, padded=True, modes=("off",)) == always | {"sliding-window"}
    assert not_revealed(tiny.config, Request([[1, 2], [1]], 2), padded=True) == []
