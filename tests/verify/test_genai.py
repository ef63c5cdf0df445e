"""onnxruntime-genai as a candidate: a model builder's directory on its own generate loop."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from tests.checkpoints import write_checkpoint
from tests.verify.comparing import Compared
from verify.errors import NoVerdict
from verify.expect import EXACT

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

FIXTURES = Path(__file__).parents[2] / "fixtures"
EXPORT = FIXTURES / "exports" / "genai"
END = 0  # of a text, for the trained model
PROMPTS = [[5, 17, 44, 80, 3, 9, 121], [200, 31, 7], [64, 65, 66, 67, 68]]


@pytest.fixture(scope="module")
def compared() -> Compared:
    return Compared(open_checkpoint(FIXTURES / "tiny_llama"), PROMPTS, 12)


def copied(directory: Path) -> Path:
    return Path(shutil.copytree(EXPORT, directory / "export"))


@pytest.mark.parametrize("path", [EXPORT, EXPORT / "model.onnx"], ids=["directory", "file"])
def test_an_export_is_equal_with_its_cache_and_without_it_row_by_row(compared: Compared, path: Path) -> None:
    found = compared.cells(path, "genai", batching="continuous")
    assert {(mode, cell.verdict, cell.batching, cell.batch_size) for mode, cell in found.items()} == {
        ("off", "equal", "static", 1),
        ("on", "equal", "static", 1),
    }
    for cell in found.values():
        assert len(cell.noise_ratio.cache) == 24
        assert not cell.noise_ratio.cache_beyond


def test_layers_that_keep_a_window_alone_are_judged_by_what_they_give(tmp_path: Path) -> None:
    """The model builder's export of a Mistral with `layer_types`, and its usual cache."""
    path = Path(shutil.copytree(FIXTURES / "exports" / "mistral-genai-window", tmp_path / "export"))
    model = onnx.load(path / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(onnx.helper.make_attribute("sliding_window_cache", 1))
    onnx.save(model, path / "model.onnx")
    config = json.loads((path / "genai_config.json").read_text())
    config["model"]["decoder"]["sliding_window"] = {
        "window_size": 13,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": [0, 1, 2, 3, 4],
        "cache_slack": 0,
    }
    (path / "genai_config.json").write_text(json.dumps(config))
    mistral = Compared(open_checkpoint(FIXTURES / "tiny_mistral"), [list(range(40, 60)), [200, 31, 7]], 12)
    for cell in mistral.cells(path, "genai").values():
        assert (cell.verdict, cell.reason, cell.noise_ratio.cache) == ("equal", None, {})


def test_weights_in_int4_are_not_equal_to_the_checkpoint(compared: Compared) -> None:
    cells = compared.cells(FIXTURES / "exports" / "genai-int4", "genai", modes=("on",))
    assert cells["on"].verdict in ("drift", "mismatch")


@pytest.mark.parametrize("name", ["genai", "genai-fp16", "genai-int4"])
def test_it_is_expected_to_compute_what_its_graph_asks_for(
    compared: Compared, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = FIXTURES / "exports" / name
    candidate = compared.open(path, "genai")
    assert candidate.expectation == compared.open(path, "ort-cpu").expectation
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not there
    assert candidate.expectation == EXACT


def test_in_float16_it_is_explained_by_that(compared: Compared) -> None:
    # With its cache onnxruntime cannot run it: shapes that the model builder declares are not those that come.
    path = FIXTURES / "exports" / "genai-fp16"
    assert compared.cells(path, "genai", modes=("off",))["off"].verdict == "drift"
    found = compared.cells(path, "genai", modes=("off",), expectation=None)["off"]
    assert (found.verdict, found.expect) == ("equal", "float16")
    assert compared.cells(path, "genai", modes=("on",))["on"].verdict == "no-verdict"


def test_it_goes_on_past_its_end_token_and_with_tokens_that_it_would_not_choose(compared: Compared) -> None:
    candidate = compared.open(EXPORT, "genai")
    tokens = [*PROMPTS[0], END, 7, END]
    whole = candidate.run(np.array([tokens]), np.arange(len(tokens))[None]).logits_BTV[0]
    read = len(PROMPTS[0])
    step = candidate.run(np.array([PROMPTS[0]]), np.arange(read)[None])
    for place in range(read, len(tokens)):
        step = candidate.run(np.array([[tokens[place]]]), np.array([[place]]), step.past)
        np.testing.assert_allclose(step.logits_BTV[0, 0], whole[place], atol=1e-4)


def test_its_end_token_does_not_end_it_where_it_is_its_own_choice(compared: Compared, tmp_path: Path) -> None:
    directory = copied(tmp_path)
    first = compared.reference.tokens[0][0]
    file = directory / "genai_config.json"
    said = json.loads(file.read_text())
    said["model"]["eos_token_id"] = first
    file.write_text(json.dumps(said))
    assert {cell.verdict for cell in compared.cells(directory, "genai").values()} == {"equal"}


def test_it_decodes_greedily_whatever_the_directory_asks_for(compared: Compared, tmp_path: Path) -> None:
    directory = copied(tmp_path)
    file = directory / "genai_config.json"
    said = json.loads(file.read_text())
    said["search"] |= {"do_sample": True, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "temperature": 9.0}
    file.write_text(json.dumps(said))
    assert {cell.verdict for cell in compared.cells(directory, "genai").values()} == {"equal"}


def test_it_does_not_go_on_from_another_past(compared: Compared) -> None:
    candidate = compared.open(EXPORT, "genai")
    tokens, positions = np.array([[5, 6]]), np.array([[0, 1]])
    first = candidate.run(tokens, positions).past
    candidate.run(tokens, positions)
    with pytest.raises(ValueError, match="its own last step"):
        candidate.run(tokens[:, :1], positions[:, 1:] + 1, first)


def test_a_row_longer_than_its_generator_is_no_verdict(compared: Compared) -> None:
    candidate = compared.open(EXPORT, "genai", {"max_length": "3"})
    with pytest.raises(NoVerdict, match=r"4 tokens do not fit .* max_length=4 or more"):
        candidate.run(np.array([[5, 6, 7, 8]]), np.arange(4)[None])


def test_a_damaged_model_is_no_verdict_in_one_line(compared: Compared, tmp_path: Path) -> None:
    directory = copied(tmp_path)
    (directory / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(NoVerdict, match="onnxruntime-genai cannot open it") as refused:
        compared.open(directory, "genai")
    assert "\n" not in str(refused.value)


def test_an_export_of_another_model_is_refused(tmp_path: Path) -> None:
    other = Compared(open_checkpoint(write_checkpoint(tmp_path)), PROMPTS, 1)
    with pytest.raises(InputError, match="candidate has 12 layers, checkpoint 3"):
        other.open(EXPORT, "genai")
