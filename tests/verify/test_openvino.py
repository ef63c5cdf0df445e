"""OpenVINO as a candidate: its IR with a cache of each kind, and what is said of one that cannot be read."""

import shutil
from pathlib import Path

import onnx
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from refengine.quant import SCHEMES
from tests.verify.commands import verify
from tests.verify.comparing import Compared, Here
from verify.candidates.files import describe_candidate
from verify.candidates.openvino import OpenVinoCandidate
from verify.compare import Comparison
from verify.errors import NoVerdict
from verify.expect import EXACT, expectations
from verify.report.result import Cell
from verify.request import Request

FIXTURES = Path(__file__).parents[2] / "fixtures"
IR = FIXTURES / "exports" / "optimum-intel"
ONNX = FIXTURES / "exports" / "optimum"
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
PROMPTS = [[5, 17, 44, 80, 3, 9, 121], [200, 31, 7], [64, 65, 66, 67, 68]]


class Quiet:
    """A progress that nobody looks at."""

    def begin(self, what: str, steps: int | None) -> None: ...

    def advance(self, steps: int) -> None: ...


@pytest.fixture(scope="module")
def compared() -> Compared:
    return Compared(open_checkpoint(FIXTURES / "tiny_llama"), PROMPTS, 12)


@pytest.fixture(scope="module")
def exact(compared: Compared) -> Compared:
    assert compared.reference  # run once, for every test that expects the exact cache
    return compared


def cells(compared: Compared, options: dict[str, str], path: Path = IR, **request: object) -> dict[str, Cell]:
    candidate = compared.open(path, "openvino", F32 | options)
    asked = Request(PROMPTS, 12, **request)
    comparison = Comparison(compared.checkpoint, asked, Quiet(), compared.reference)
    return {cell.cache: cell for cell in comparison.cells(Here(candidate))}


@pytest.mark.parametrize("path", [IR, IR / "openvino_model.xml", ONNX], ids=["directory", "xml", "onnx"])
def test_with_a_float_cache_an_export_is_equal_with_and_without_it(exact: Compared, path: Path) -> None:
    found = cells(exact, {"KV_CACHE_PRECISION": "f32"}, path)
    assert [(mode, cell.verdict, cell.expect) for mode, cell in found.items()] == [
        ("off", "equal", "float32"),
        ("on", "equal", "float32"),
    ]
    assert {len(cell.noise_ratio.cache) for cell in found.values() if cell.noise_ratio} == {24}


CACHES = {
    "ov-f16": {"KV_CACHE_PRECISION": "f16"},
    "ov-u8": {"KV_CACHE_PRECISION": "u8"},
    "ov-u4": {"KV_CACHE_PRECISION": "u4"},
    "u8 keys in groups of 16, u4 values in groups of 16": {
        "KEY_CACHE_PRECISION": "u8",
        "VALUE_CACHE_PRECISION": "u4",
    },
    "u8 keys in groups of 8, u8 values in groups of 16": {
        "KV_CACHE_PRECISION": "u8",
        "KEY_CACHE_GROUP_SIZE": "8",
    },
    "u8 keys by channel in groups of 16, u8 values in groups of 16": {
        "KV_CACHE_PRECISION": "u8",
        "KEY_CACHE_QUANT_MODE": "BY_CHANNEL",
    },
}


@pytest.mark.parametrize("name", CACHES)
def test_with_a_quantised_cache_it_drifts_from_the_exact_one_and_is_equal_to_the_reference_with_the_same(
    exact: Compared, name: str
) -> None:
    without = cells(exact, CACHES[name], modes=("on",))["on"]
    assert without.verdict in ("drift", "mismatch")
    found = cells(exact, CACHES[name], expectation=None)
    assert (found["off"].verdict, found["off"].expect) == ("equal", "float32")
    assert (found["on"].verdict, found["on"].expect) == ("equal", name)
    assert found["on"].noise_ratio.logits < without.noise_ratio.logits / 100


def test_another_cache_than_the_expected_one_is_not_equal(exact: Compared) -> None:
    wrong = expectations()["int8-kv"]
    assert cells(exact, CACHES["ov-u8"], modes=("on",), expectation=wrong)["on"].verdict in ("drift", "mismatch")


def test_rows_cannot_join_the_past_that_it_keeps_so_it_is_run_in_static_batches(exact: Compared) -> None:
    found = cells(exact, {"KV_CACHE_PRECISION": "f32"}, batching="continuous", batch_size=2)
    assert {(cell.verdict, cell.batching) for cell in found.values()} == {("equal", "static")}


def test_the_command_line_takes_the_cache_from_the_runtimes_settings_and_says_so(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"token_ids": [5, 17, 44, 80]}\n{"token_ids": [9, 121]}\n')
    options = ["--provider-option", "INFERENCE_PRECISION_HINT=f32", "--provider-option", "KV_CACHE_PRECISION=u8"]
    given = ("--runtime", "openvino", *options, "--prompts", prompts, "--max-new-tokens", 6)
    done = verify("compare", FIXTURES / "tiny_llama", IR, *given, "--expect", "auto")
    assert done.code == 0, done.out + done.err
    assert "what is expected (float32, ov-u8)" in done.first_lines[0]
    assert "note: openvino: its settings say that it computes as ov-u8" in done.out
    exact = verify("compare", FIXTURES / "tiny_llama", IR, *given)
    assert exact.code == 1


def test_a_run_with_an_expected_cache_is_not_kept_as_the_exact_one() -> None:
    kept = ("--expect", "ov-u8", "--save-reference", "reference.npz")
    done = verify("compare", FIXTURES / "tiny_llama", IR, "--runtime", "openvino", *kept)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("verify: --reference, --save-reference: a run that is kept is exact")


def test_every_scheme_can_be_expected_under_one_name() -> None:
    known = expectations()
    assert known["float32"] is EXACT
    assert sum(each.scheme is not None for each in known.values()) == len(SCHEMES) - 2  # both floats are exact
    assert known["int8-kv"].scheme is SCHEMES["int8"]
    assert known["ov-u8"].scheme is SCHEMES["ov-u8"]


def copied(directory: Path) -> Path:
    for file in IR.iterdir():
        shutil.copy(file, directory)
    return directory / "openvino_model.xml"


def test_an_ir_without_its_weights_is_refused(tmp_path: Path) -> None:
    copied(tmp_path).with_suffix(".bin").unlink()
    with pytest.raises(InputError, match=r"openvino_model.bin: no such file; expected OpenVINO's IR"):
        describe_candidate(tmp_path)


@pytest.mark.parametrize(("text", "words"), [("<net", "not a whole IR"), ("<svg/>", "found XML of <svg>")])
def test_a_file_that_is_no_ir_is_refused(tmp_path: Path, text: str, words: str) -> None:
    copied(tmp_path).write_text(text)
    with pytest.raises(InputError, match=words):
        describe_candidate(tmp_path)


def test_truncated_weights_are_refused_in_one_line(tmp_path: Path, compared: Compared) -> None:
    weights = copied(tmp_path).with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut short, or of another export") as refused:
        compared.open(tmp_path, "openvino")
    assert "\n" not in str(refused.value)


def test_a_property_that_openvino_does_not_take_is_no_verdict(compared: Compared) -> None:
    with pytest.raises(NoVerdict, match="openvino cannot compile it") as refused:
        compared.open(IR, "openvino", {"KV_CACHE_PRECISION": "u7"})
    assert "\n" not in str(refused.value)


def test_an_ir_is_refused_by_a_runtime_that_reads_onnx(compared: Compared) -> None:
    with pytest.raises(InputError, match=r"expected an \.onnx file"):
        compared.open(IR / "openvino_model.xml", "ort-cpu")


def test_an_ir_of_another_model_is_refused(tmp_path: Path) -> None:
    done = verify("compare", FIXTURES / "golden" / "none", IR, "--runtime", "openvino")
    assert done.code == 2


def test_a_stateful_export_does_not_go_on_from_another_past(compared: Compared) -> None:
    import numpy as np

    candidate = compared.open(IR, "openvino", F32)
    assert isinstance(candidate, OpenVinoCandidate)
    tokens, positions = np.array([[5, 6]]), np.array([[0, 1]])
    first = candidate.run(tokens, positions).past
    candidate.run(tokens, positions)
    with pytest.raises(ValueError, match="its own last step"):
        candidate.run(tokens[:, :1], positions[:, 1:] + 1, first)


def test_an_operator_that_openvino_does_not_have_ends_without_a_verdict(compared, tmp_path):
    model = onnx.load(FIXTURES / "exports" / "optimum" / "model.onnx")
    foreign = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    foreign.domain = "com.nobody"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(NoVerdict, match="openvino cannot convert it: "):
        compared.open(tmp_path / "model.onnx", "openvino")
