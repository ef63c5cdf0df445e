"""Where a mistake is in what OpenVINO runs: its IR with a cache of each kind, and ONNX files that it converts."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openvino import opset13

from refengine.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.verify.comparing import Compared
from tests.verify.faulty import (
    changed_weight,
    interleaved_rotation,
    only_in,
    tiled_heads,
    write_faulty,
)
from tests.verify.faulty_ir import PLANTED, Edit, Nodes, converted, edited, fed_by, planted, times, with_constant
from tests.verify.seen import Seen
from verify.candidates.cut_ir import files_ir
from verify.candidates.trace_ir import read_ir
from verify.errors import NoVerdict
from verify.expect import expectations
from verify.export.modules import MODULES
from verify.locate import Located, write_repro

pytestmark = pytest.mark.slow

EXPORTS = Path(__file__).parents[2] / "fixtures" / "exports"
STEPS = 2
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Compared:
    """A random model of three layers, and two rows of different lengths."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("small")))
    first, second = np.random.default_rng(4).integers(0, checkpoint.config.vocab_size, (2, 9)).tolist()
    return Compared(checkpoint, [first, second[:4]], STEPS)


@pytest.fixture(scope="module")
def trained() -> Compared:
    """The model that the frozen exports are of."""
    return Compared(open_checkpoint(EXPORTS.parent / "tiny_llama"), [[5, 17, 44, 80, 3], [200, 31, 7]], STEPS)


def place(located: Located) -> tuple[object, ...]:
    """Of the first that is wrong: layer, point, node and phase."""
    assert located.first is not None, located.notes
    first = located.first
    assert (first.provider, located.vanishes) == ("CPU", False)
    return first.layer, first.point, first.node, first.phase


def other_eps(at, x_BTD, eps):
    return MODULES.rms_norm(at, x_BTD, 3e-2)


def gate_for_up(at, gate_BTF, up_BTF):
    return MODULES.silu_gate(at, up_BTF, gate_BTF)


def scaled_weight(name: str) -> dict[str, Any]:
    return {"read": changed_weight(f"{name}.weight.T", lambda weight: weight * 1.01)}


# Of an own export in its second layer: from what it is read, what is other, the trace point, the node.
WRITTEN = {
    "pairs": (
        "onnx",
        {"modules": only_in([1], "rotate", interleaved_rotation)},
        "self_attn.q_rope",
        "self_attn/q_rope/Gather",
    ),
    "gate": ("stateless", {"modules": only_in([1], "silu_gate", gate_for_up)}, "mlp.activation", "mlp/activation/Mul"),
    "heads": (
        "stateful",
        {"modules": only_in([1], "repeat_kv", tiled_heads)},
        "self_attn.attend",
        "self_attn/k_repeat/Concat",
    ),
    "values": ("onnx", scaled_weight("model.layers.1.self_attn.v_proj"), "self_attn.v_proj", "self_attn/v_proj/MatMul"),
    "down": ("stateless", scaled_weight("model.layers.1.mlp.down_proj"), "mlp.down_proj", "mlp/down_proj/MatMul"),
}


@pytest.fixture(scope="module")
def right(small, tmp_path_factory) -> dict[bool, Path]:
    """The random model's IR without a mistake: stateful, and not."""
    directory = tmp_path_factory.mktemp("right")
    path = write_faulty(small.checkpoint, directory / "model.onnx")
    return {stateful: converted(path, directory / str(stateful), stateful=stateful) for stateful in (True, False)}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_mistake_is_found_in_its_node_whatever_openvino_reads_it_from(small, tmp_path, name):
    kind, how, point, node = WRITTEN[name]
    path = write_faulty(small.checkpoint, tmp_path / "model.onnx", **how)
    if kind != "onnx":
        path = converted(path, tmp_path, stateful=kind == "stateful")
    located = Seen(small, path, "openvino", **F32).located()
    assert place(located) == (1, point, f"/model/layers.1/{node}", "prefill")
    assert located.layers == (1,)
    assert located.first.heads == ((1, 4) if name == "heads" else ())  # k0 k1 k0 k1 k0 k1 for k0 k0 k0 k1 k1 k1


def test_a_wrong_head_is_behind_the_last_layer(small, tmp_path):
    path = write_faulty(small.checkpoint, tmp_path / "model.onnx", **scaled_weight("lm_head"))
    located = Seen(small, path, "openvino", **F32).located()
    assert (*place(located), located.layers) == (None, "lm_head", "logits", "prefill", ())


def keys_kept_enlarged(nodes: Nodes) -> None:
    """Attention reads the right keys, and others are kept."""
    readers = (port.get_node() for port in nodes["present.1.key"].output(0).get_target_inputs())
    keeps = next(node for node in readers if node.get_type_name() == "Assign")
    planted("present.1.key", times(1.05), keeps.get_friendly_name())(nodes)


def larger_for(is_meant: Callable[..., Any]) -> Callable[[Any], Any]:
    """A product with a little more than 1 where the pass has as many tokens as is meant."""

    def make(given: Any) -> Any:
        tokens = opset13.gather(opset13.shape_of(given), opset13.constant(1), opset13.constant(0))
        more = opset13.convert(is_meant(tokens, opset13.constant(np.int64(1))), "f32")
        return opset13.multiply(given, opset13.exp(opset13.multiply(more, opset13.constant(np.float32(0.01)))))

    return make


DOWN = "/model/layers.1/mlp/down_proj/MatMul"
# Whether it is stateful, the edit, the trace point, where it shows first.
IN_SOME_PASSES: dict[str, tuple[bool, Edit, str, str]] = {
    "other keys kept": (True, keys_kept_enlarged, "self_attn.k_cache", "prefill"),
    "prefill alone": (True, planted(DOWN, larger_for(opset13.greater)), "mlp.residual", "prefill"),
    "decode alone": (False, planted(DOWN, larger_for(opset13.equal)), "mlp.residual", "decode step 1"),
}


@pytest.mark.parametrize("name", IN_SOME_PASSES)
def test_a_mistake_is_found_in_the_pass_that_it_begins_in(small, right, tmp_path, name):
    stateful, edit, point, phase = IN_SOME_PASSES[name]
    located = Seen(small, edited(right[stateful], edit, tmp_path), "openvino", **F32).located()
    assert (*place(located), located.layers) == (1, point, PLANTED, phase, (1,))


LAYER = "__module.model.layers.5."
ATTENTION = f"{LAYER}self_attn/aten::scaled_dot_product_attention/ScaledDotProductAttention"
KEYS = f"{LAYER}self_attn/aten::cat/Concat_2"  # past and new ones


def past_enlarged(nodes: Nodes) -> None:
    """Keys of the past are larger whenever they are read."""
    planted(nodes[KEYS].input_value(0).get_node().get_friendly_name(), times(1.05), KEYS)(nodes)


# Of a frozen export: which, the edit, the trace point, the node, where it shows first.
FROZEN: dict[str, tuple[str, Edit, str, str, str]] = {
    "past enlarged": ("optimum-intel", past_enlarged, "self_attn.k_cache", PLANTED, "decode step 1"),
    "scale of the fused attention": (
        "optimum-intel",
        with_constant(ATTENTION, 4, lambda scale: scale * 1.2),
        "self_attn.attend",
        ATTENTION,
        "prefill",
    ),
    "keys not rotated": (
        "optimum-intel-stateless",
        fed_by(KEYS, 1, f"{LAYER}self_attn/aten::transpose/Transpose_1"),
        "self_attn.k_rope",
        KEYS,
        "prefill",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_mistake_in_a_frozen_ir_is_found_in_its_node(trained, tmp_path, name):
    export, edit, point, node, phase = FROZEN[name]
    path = edited(EXPORTS / export / "openvino_model.xml", edit, tmp_path)
    located = Seen(trained, path, "openvino", **F32).located()
    assert (*place(located), located.layers) == (5, point, node, phase, (5,))


def test_behind_a_cache_of_8_bits_a_mistake_is_found_without_taking_the_cache_from_its_attention(trained, tmp_path):
    edit = with_constant(f"{LAYER}self_attn.v_proj/aten::linear/MatMul", 1, lambda weight: weight * 1.01)
    path = edited(EXPORTS / "optimum-intel" / "openvino_model.xml", edit, tmp_path)
    options = {**F32, "KV_CACHE_PRECISION": "u8"}
    located = Seen(trained, path, "openvino", expectations()["ov-u8"], **options).located()
    assert place(located) == (5, "self_attn.v_proj", f"{LAYER}self_attn.v_proj/aten::linear/MatMul", "prefill")


def test_nothing_is_found_in_an_ir_that_is_right(small, right):
    located = Seen(small, right[True], "openvino", **F32).located()
    assert (located.first, located.layers) == (None, ())
    assert "no part of the model is wrong by itself" in located.notes


def test_what_is_cut_out_of_an_ir_shows_the_mistake_with_openvino_and_numpy_alone(small, tmp_path):
    path = write_faulty(small.checkpoint, tmp_path / "model.onnx", modules=only_in([1], "rms_norm", other_eps))
    seen = Seen(small, converted(path, tmp_path, stateful=True), "openvino", **F32)
    located = seen.located()
    assert place(located) == (1, "input_layernorm", "/model/layers.1/input_layernorm/Add", "prefill")
    assert located.first.replays == ()  # whoever runs the node: the graph is wrong, not the runtime
    write_repro(seen.candidate, located.shown, tmp_path / "repro", "CPU")
    done = subprocess.run(
        [sys.executable, "repro.py"], cwd=tmp_path / "repro", capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("given by /model/layers.1/input_layernorm/")
    assert float(done.stdout.split("largest error ")[1].split()[0]) > 1e-4


def test_a_part_that_reads_what_was_not_looked_at_is_not_cut_out(small, right):
    candidate = small.open(right[True], "openvino", F32)
    keys = read_ir(candidate).kept["layers.1.self_attn.k_cache"]
    with pytest.raises(NoVerdict, match="reads more than was looked at"):
        files_ir(candidate, [keys], {}, [keys])
