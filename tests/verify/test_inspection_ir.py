"""OpenVINO's IR read without running it: what it is, and with OpenVINO, what it is compiled to."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from tests.checkpoints import write_checkpoint
from tests.verify.commands import verify
from verify.candidates.openvino import OpenVinoCandidate
from verify.candidates.openvino_file import describe_ir
from verify.inspection import facts, inspect
from verify.interface import check_same_model

FIXTURES = Path(__file__).parents[2] / "fixtures"
IR = FIXTURES / "exports" / "optimum-intel"


def copied(directory: Path) -> Path:
    for file in IR.iterdir():
        shutil.copy(file, directory)
    return directory / "openvino_model.xml"


@pytest.fixture(scope="module")
def stateless(tmp_path_factory) -> Path:
    """The embedded model's ONNX export, converted: its past is fed and given."""
    openvino = pytest.importorskip("openvino")
    path = tmp_path_factory.mktemp("stateless") / "model.xml"
    openvino.save_model(openvino.convert_model(FIXTURES / "exports" / "optimum" / "model.onnx"), path)
    return path


def test_a_stateful_ir_is_the_checkpoints_with_a_cache_that_it_keeps_to_itself(tiny):
    found = inspect(IR)
    assert found.why_not is None
    check_same_model(found.interface, tiny.config, found.query_heads)
    sizes = (len(found.interface.layers), found.query_heads, found.interface.kv_heads, found.interface.head_dim)
    assert sizes == (12, 6, 2, 16)
    assert found.interface.is_stateful
    shown = dict(facts(found))
    assert shown["cache"] == "yes, float32, which it keeps to itself (stateful)"
    assert shown["exporter"].startswith("optimum-intel ")
    assert shown["inputs"].splitlines()[-1] == "beam_idx: int32 [?]"
    assert shown["outputs"] == "logits: float32 [?, ?, 384]"
    assert (shown["opset"], shown["IR version"]) == ("openvino 13", "11")
    assert "ScaledDotProductAttention 12" in shown["operators"]
    assert "Const" not in shown["operators"]


def test_a_stateless_ir_declares_its_past_under_the_names_it_had(tiny, stateless):
    found = inspect(stateless)
    assert found.why_not is None
    check_same_model(found.interface, tiny.config)
    assert (len(found.interface.layers), found.interface.is_stateful) == (12, False)
    declared = {each.name: each for each in (*found.file.inputs, *found.file.outputs)}
    assert declared["past_key_values.3.key"].shape[1::2] == (2, 16)
    assert declared["present.11.value"].dtype == "float32"
    assert found.file.states == ()


def test_weights_are_counted_by_dtype_as_they_are_stored():
    whole, compressed = (
        describe_ir(FIXTURES / "exports" / name / "openvino_model.xml") for name in (IR.name, f"{IR.name}-int8")
    )
    assert set(whole.weights) == {"float32"}
    assert next(iter(compressed.weights)) == "uint8"
    assert compressed.weights["uint8"].nbytes == compressed.weights["uint8"].elements
    stored = sum(total.nbytes for total in whole.weights.values())
    assert 0.99 < stored / (IR / "openvino_model.bin").stat().st_size <= 1


def test_with_openvino_it_says_what_it_is_compiled_to_and_every_property():
    done = verify("inspect", IR, "--runtime", "openvino")
    assert (done.code, done.err) == (0, "")
    shown = " ".join(done.out.split())
    assert "runtime openvino, OpenVINO 20" in shown
    assert "CPU runs " in shown
    assert "ScaledDotProductAttention 12" in shown
    assert "KV_CACHE_PRECISION " in shown
    assert "INFERENCE_PRECISION_HINT " in shown


def test_an_onnx_file_is_shown_as_openvino_compiles_it():
    found = inspect(FIXTURES / "exports" / "optimum", "openvino")
    ran = found.settings.effective["providers"]["CPU"]
    assert ran["nodes"] == sum(ran["operators"].values())
    assert ran["operators"]["FullyConnected"] > 0


def test_a_runtime_that_opens_no_ir_is_refused():
    done = verify("inspect", IR, "--runtime", "ort-cpu")
    assert (done.code, done.out) == (2, "")
    assert (
        "--runtime ort-cpu: openvino_model.xml was to be opened to see who runs what; openvino can do that" in done.err
    )


@pytest.mark.parametrize("command", ["inspect", "inspect with MODEL", "compare"])
@pytest.mark.parametrize("kept", [0, 1000])
def test_weights_that_were_cut_short_are_refused_before_anything_is_opened(tiny, tmp_path, command, kept):
    weights = copied(tmp_path).with_suffix(".bin")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:kept])
    given = {"inspect": ["inspect"], "inspect with MODEL": ["inspect", tiny.path], "compare": ["compare", tiny.path]}
    runtime = ["--runtime", "openvino"] if command == "compare" else []
    done = verify(*given[command], tmp_path, *runtime)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert (
        f"openvino_model.bin: expected the {len(whole)} bytes that openvino_model.xml refers to, found {kept}"
        in done.err
    )
    assert "copy both again" in done.err


@pytest.mark.parametrize(
    ("place", "attribute", "value"),
    [
        ("layers/layer[@type='Const']/data", "offset", "here"),
        ("layers/layer[@type='Const']/data", "size", None),
        ("layers/layer[@type='Parameter']/output/port", "precision", None),
        (".", "version", "eleven"),
    ],
)
def test_an_ir_that_lacks_a_part_is_refused_in_one_line(tmp_path, place, attribute, value):
    path = copied(tmp_path)
    tree = ElementTree.parse(path)
    node = tree.getroot().find(place) if place != "." else tree.getroot()
    node.attrib.pop(attribute)
    if value is not None:
        node.set(attribute, value)
    tree.write(path)
    with pytest.raises(InputError, match="not a whole IR") as refusal:
        describe_ir(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"num_hidden_layers": 3}, "candidate has 12 layers, checkpoint 3"),
        ({"num_key_value_heads": 3}, "candidate has 2 KV heads, checkpoint 3"),
        ({"num_attention_heads": 4}, "candidate has 6 query heads, checkpoint 4"),
        ({"head_dim": 10}, "candidate has 16 dimensions a head, checkpoint 10"),
        ({"vocab_size": 67}, "candidate has 384 tokens in its vocabulary, checkpoint 67"),
    ],
)
def test_a_stateful_ir_of_another_model_is_refused_with_both_sides_named(tmp_path, other, says):
    same = {"num_hidden_layers": 12, "num_key_value_heads": 2, "num_attention_heads": 6, "head_dim": 16}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, **({"vocab_size": 384} | same | other)))
    with pytest.raises(InputError, match=f"openvino_model.xml: {says}: the export is of another model"):
        OpenVinoCandidate.open(IR, "openvino", {}, checkpoint.config)


def test_an_ir_that_is_no_decoder_is_inspected_and_says_why_not(tmp_path):
    path = copied(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("input_ids", "pixels"), encoding="utf-8")
    shown = dict(facts(inspect(path)))
    assert shown["decoder"].startswith("no: pixels: this input is not known")


def test_json_of_an_ir_is_its_weights_beside_the_checkpoint(tiny, tmp_path):
    done = verify("inspect", tiny.path, IR, "--json", tmp_path / "weights.json")
    assert done.code == 0
    assert json.loads((tmp_path / "weights.json").read_text(encoding="utf-8"))["is_faithful"]
