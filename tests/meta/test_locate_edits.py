"""Where mistakes are that leave a step out, or leave its input as it is, in exports of several exporters."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.meta.test_locate import FIXTURES, LAYER, STEPS, TEXTS
from tests.verify.comparing import Compared
from tests.verify.seen import Seen
from verify.export import export_decoder

pytestmark = pytest.mark.slow

LLAMA = FIXTURES / "tiny_llama"
Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def compared() -> Compared:
    tokenizer = load_tokenizer(LLAMA)
    return Compared(open_checkpoint(LLAMA), [encode_prompt(tokenizer, text, chat=False) for text in TEXTS], STEPS)


def edited(exporter: str, out: Path, edit: Edit) -> Path:
    model = onnx.load(FIXTURES / "exports" / exporter / "model.onnx")
    edit(model)
    onnx.save(model, out)
    return out


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def replace_input(reader: str, number: int, tensor: str) -> Edit:
    """A node that reads another tensor than it should."""

    def edit(model: onnx.ModelProto) -> None:
        node_of(model, reader).input[number] = tensor

    return edit


def fill(initializer: str, number: float) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == initializer)
        filled = np.full_like(numpy_helper.to_array(tensor), number)
        tensor.CopyFrom(numpy_helper.from_array(filled, initializer))

    return edit


def columns_lost(initializer: str, columns: slice) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == initializer)
        array = numpy_helper.to_array(tensor).copy()
        array[:, columns] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, initializer))

    return edit


def round_past(past: str) -> Edit:
    """The past is rounded to float16 whenever it is read."""

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if past in node.input:
                node.input[list(node.input).index(past)] = "past_rounded"
        nodes = [
            helper.make_node("Cast", [past], ["past_half"], name="narrowed", to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["past_half"], ["past_rounded"], name="widened", to=TensorProto.FLOAT),
        ]
        for node in reversed(nodes):
            model.graph.node.insert(0, node)

    return edit


def give(output: str, other: str) -> Edit:
    """An output that is another one."""

    def edit(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if output in node.output).output[0] = "unused"
        for node in model.graph.node:
            node.input[:] = ["unused" if name == output else name for name in node.input]
        model.graph.node.append(helper.make_node("Identity", [other], [output], name="given"))

    return edit


def scale(tensor: str) -> Edit:
    """Whoever reads a tensor finds a tenth less in it."""

    def edit(model: onnx.ModelProto) -> None:
        readers = [node for node in model.graph.node if tensor in node.input]
        place = next(place for place, node in enumerate(model.graph.node) if tensor in node.output)
        for node in readers:
            node.input[:] = ["less" if name == tensor else name for name in node.input]
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.9, np.float32), "factor"))
        model.graph.node.insert(place + 1, helper.make_node("Mul", [tensor, "factor"], ["less"], name="scaled"))

    return edit


def cap_positions(model: onnx.ModelProto) -> None:
    """No token stands behind the first few."""
    place, reader = next(each for each in enumerate(model.graph.node) if "position_ids" in each[1].input)
    reader.input[0] = "capped"
    model.graph.initializer.append(numpy_helper.from_array(np.array(3), "last"))
    model.graph.node.insert(place, helper.make_node("Min", ["position_ids", "last"], ["capped"], name="capping"))


FIRST_SUM = "add_594"  # behind the first layer, as dynamo calls it
IN_LAYER = f"/model/layers.{LAYER}"
EDITS = {
    "queries that are not rotated": (
        "optimum",
        replace_input(f"{IN_LAYER}/self_attn/Mul_8", 0, f"{IN_LAYER}/self_attn/Transpose_output_0"),
        (LAYER, "self_attn.q_rope", f"{IN_LAYER}/self_attn/Mul_8"),
    ),
    "the last norm left out": (
        "optimum",
        replace_input("/lm_head/MatMul", 0, "/model/norm/Cast_output_0"),
        (None, "norm", "/lm_head/MatMul"),
    ),
    "a norm without weight": (
        "optimum",
        fill(f"model.layers.{LAYER}.input_layernorm.weight", 1),
        (LAYER, "input_layernorm", f"{IN_LAYER}/input_layernorm/Mul_1"),
    ),
    "an activation left out": (
        "optimum-no-past",
        replace_input(f"{IN_LAYER}/mlp/Mul", 0, f"{IN_LAYER}/mlp/gate_proj/MatMul_output_0"),
        (LAYER, "mlp.activation", f"{IN_LAYER}/mlp/down_proj/MatMul"),
    ),
    "keys of another layer": (
        "optimum",
        give(f"present.{LAYER}.key", f"present.{LAYER - 1}.key"),
        (LAYER, "self_attn.k_cache", "given"),
    ),
    "an embedding that is cast": (
        "optimum",
        fill("model.embed_tokens.weight", 0.5),
        (None, "embed_tokens", "/model/embed_tokens/Gather"),
    ),
    "a stream that is scaled behind a layer": (
        "dynamo",
        scale(FIRST_SUM),
        (0, "mlp.residual", "scaled"),
    ),
    "keys of a fused projection": (
        "genai",
        columns_lost(f"model.layers.{LAYER}.attn.qkv_proj.MatMul.weight", slice(96, 128)),
        (LAYER, "self_attn.k_proj", f"{IN_LAYER}/attn/qkv_proj/MatMul"),
    ),
    "positions that end": (
        "dynamo",
        cap_positions,
        (0, "self_attn.q_rope", "capping"),
    ),
    "a past that is rounded": (
        "dynamo",
        round_past(f"past_key_values.{LAYER}.value"),
        (LAYER, "self_attn.v_cache", "narrowed"),
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_step_that_is_left_out_is_found_where_it_should_have_been(compared, tmp_path, name):
    exporter, edit, place = EDITS[name]
    first = Seen(compared, edited(exporter, tmp_path / "model.onnx", edit)).located().first
    assert (first.layer, first.point, first.node) == place


@pytest.mark.parametrize("order", [(2, 0, 5, 1, 3, 4), (0, 1, 2, 4, 3, 5), (0, 0, 0, 3, 3, 3)])
def test_heads_that_have_changed_places_are_told_apart(compared, tmp_path, order):
    def reorder(model: onnx.ModelProto) -> None:
        attended = f"{IN_LAYER}/self_attn/MatMul_1_output_0"
        place, reader = next(each for each in enumerate(model.graph.node) if attended in each[1].input)
        reader.input[0] = "reordered"
        model.graph.initializer.append(numpy_helper.from_array(np.array(order), "order"))
        model.graph.node.insert(place, helper.make_node("Gather", [attended, "order"], ["reordered"], axis=1))

    first = Seen(compared, edited("optimum-no-past", tmp_path / "model.onnx", reorder)).located().first
    assert (first.layer, first.node, first.order) == (LAYER, "reordered", order)


def test_a_mask_that_leaves_the_past_out_is_wrong_where_new_tokens_are_counted(compared, tmp_path):
    export_decoder(compared.checkpoint, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    mask = "/model/attention_mask"
    counts = node_of(model, f"{mask}/Range_1")
    counts.input[:2] = [f"{mask}/zero", node_of(model, f"{mask}/Gather").output[0]]
    onnx.save(model, tmp_path / "faulty.onnx")
    first = Seen(compared, tmp_path / "faulty.onnx").located().first
    assert (first.point, first.node, first.phase) == ("self_attn.attend", counts.name, "decode step 1")


def test_a_provider_that_has_no_tensors_of_sizes_is_looked_into_without_them(compared, tmp_path):
    keys = f"{IN_LAYER}/self_attn/k_proj/MatMul_output_0"

    def biased(model: onnx.ModelProto) -> None:
        place, reader = next(each for each in enumerate(model.graph.node) if keys in each[1].input)
        reader.input[0] = "biased"
        model.graph.initializer.append(numpy_helper.from_array(np.full(32, 0.01, np.float32), "bias"))
        model.graph.node.insert(place, helper.make_node("Add", [keys, "bias"], ["biased"], name="biasing"))

    first = Seen(compared, edited("optimum", tmp_path / "model.onnx", biased), "ort-openvino").located().first
    assert (first.untraced, first.layer, first.node) == (None, LAYER, "biasing")


def test_a_node_that_leaves_what_it_reads_as_it_is_is_no_fault_of_who_runs_it(compared, tmp_path):
    """The sum with an epsilon of nothing is what it should be but for noise; what is made of it is not."""

    def lessened(model: onnx.ModelProto) -> None:
        name = node_of(model, "/model/norm/Add").input[1]
        constant = next(node for node in model.graph.node if name in node.output)
        constant.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(1e-6, np.float32)))

    first = Seen(compared, edited("optimum", tmp_path / "model.onnx", lessened)).located().first
    assert (first.point, first.replays in (None, ())) == ("norm", True)
