"""Quantised weights as ONNX and OpenVINO store them: read as the runtimes read them, and told from wrong ones."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13

from refengine.errors import InputError
from verify.candidates.onnx_weights import onnx_weights
from verify.candidates.openvino_weights import ir_weights
from verify.weights.relation import Compared, compare_values
from verify.weights.stored import StoredWeight, Values, dequantised

OUTPUTS, INPUTS = 24, 50  # blocks of 16 leave a short one at the end of each row


def random(seed: int = 0, rows: int = OUTPUTS, columns: int = INPUTS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def single(path: Path, nodes: list[onnx.NodeProto], inputs: int, **constants: np.ndarray | TensorProto) -> StoredWeight:
    """The one weight of a graph, saved at `path`."""
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [inputs, inputs])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [given], [result], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    (weight,) = onnx_weights(path)
    return weight


def run_on_onnxruntime(path: Path, inputs: int) -> np.ndarray:
    """What the graph gives for the identity: its weight, (inputs, outputs)."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    fed = {given.name: np.eye(inputs, dtype=np.float32) for given in session.get_inputs()}
    return session.run(None, fed)[0]


@pytest.mark.parametrize(("bits", "zero_points"), [*itertools.product((2, 4, 8), ("none", "packed")), (4, "floats")])
def test_blocks_of_matmulnbits_are_read_as_onnxruntime_reads_them(tmp_path, bits, zero_points):
    rng = np.random.default_rng(bits)
    blocks = -(-INPUTS // 16)
    constants = {
        "B": rng.integers(0, 256, (OUTPUTS, blocks, 16 * bits // 8), np.uint8),
        "scales": rng.random(OUTPUTS * blocks, np.float32),
    }
    if zero_points == "packed":
        constants["zero_points"] = rng.integers(0, 256, OUTPUTS * -(-blocks * bits // 8), np.uint8)
    if zero_points == "floats":
        constants["zero_points"] = (rng.random(OUTPUTS * blocks) * 2**bits).astype(np.float32)
    sizes = {"K": INPUTS, "N": OUTPUTS, "bits": bits, "block_size": 16}
    node = helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **sizes)
    weight = single(tmp_path / "m.onnx", [node], INPUTS, **constants)
    assert (weight.shape, weight.bits, weight.block, weight.outputs_in_rows) == ((OUTPUTS, INPUTS), bits, 16, True)
    expected = run_on_onnxruntime(tmp_path / "m.onnx", INPUTS).T
    # code * scale less zero point * scale there, so that numbers near zero lose digits.
    np.testing.assert_allclose(weight.read().values_RC, expected, rtol=1e-6, atol=2.0 ** (bits - 22))


@pytest.mark.parametrize("kind", [0, 1], ids=["fp4", "nf4"])
def test_codes_of_bitsandbytes_are_read_as_onnxruntime_reads_them(tmp_path, kind):
    rng = np.random.default_rng(kind)
    numbers = OUTPUTS * INPUTS  # no whole number of blocks in a row
    constants = {
        "B": rng.integers(0, 256, -(-numbers // 2), np.uint8),
        "absmax": rng.random(-(-numbers // 16), np.float32),
    }
    sizes = {"K": INPUTS, "N": OUTPUTS, "quant_type": kind, "block_size": 16}
    node = helper.make_node("MatMulBnb4", ["x", *constants], ["y"], domain="com.microsoft", **sizes)
    weight = single(tmp_path / "m.onnx", [node], INPUTS, **constants)
    assert (weight.shape, weight.bits, weight.block, weight.outputs_in_rows) == ((OUTPUTS, INPUTS), 4, 16, True)
    expected = run_on_onnxruntime(tmp_path / "m.onnx", INPUTS).T
    np.testing.assert_allclose(weight.read().values_RC, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "uint8"])
@pytest.mark.parametrize("with_zero_points", [False, True])
def test_tables_whose_rows_are_gathered_are_read_as_onnxruntime_reads_them(tmp_path, dtype, with_zero_points):
    rng, columns = np.random.default_rng(5), 64
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "uint8": (0, 256)}[dtype]
    packed = 2 if dtype == "uint8" else 1  # two codes in a byte

    def made(name: str, width: int) -> TensorProto:
        codes = rng.integers(low, high, OUTPUTS * width // packed)
        return helper.make_tensor(name, getattr(TensorProto, dtype.upper()), (OUTPUTS, width // packed), codes)

    constants = {"table": made("table", columns), "scales": random(1, OUTPUTS, columns // 16)}
    inputs = ["table", "rows", "scales"]
    if with_zero_points:
        constants["zero_points"] = made("zero_points", columns // 16)
        inputs.append("zero_points")
    sizes = {"bits": 4, "block_size": 16, "quantize_axis": 1}
    cast = helper.make_node("Cast", ["x"], ["rows"], to=TensorProto.INT64)
    node = helper.make_node("GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", **sizes)
    weight = single(tmp_path / "m.onnx", [cast, node], OUTPUTS, **constants)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    every_row = np.tile(np.arange(OUTPUTS, dtype=np.float32), (OUTPUTS, 1))
    expected = session.run(None, {"x": every_row})[0][0]
    np.testing.assert_array_equal(weight.read().values_RC, expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("form", ["per tensor", "per row", "per column", "blocks of rows", "blocks of columns"])
def test_dequantizelinear_is_read_as_onnxruntime_reads_it(tmp_path, dtype, form):
    rng = np.random.default_rng(3)
    rows, columns = 32, 48
    low, high = (
        (-8, 8) if dtype == "int4" else (0, 16) if dtype == "uint4" else (-128, 128) if dtype == "int8" else (0, 256)
    )
    shape, attributes = {
        "per tensor": ((), {}),
        "per row": ((rows,), {"axis": 0}),
        "per column": ((columns,), {"axis": 1}),
        "blocks of rows": ((rows, columns // 16), {"axis": 1, "block_size": 16}),
        "blocks of columns": ((rows // 16, columns), {"axis": 0, "block_size": 16}),
    }[form]
    elem_type = getattr(TensorProto, dtype.upper())
    codes = helper.make_tensor("codes", elem_type, (rows, columns), rng.integers(low, high, rows * columns))
    zero_point = helper.make_tensor(
        "zero_point", elem_type, shape, np.atleast_1d(rng.integers(low, high, shape)).ravel()
    )
    scale = np.asarray(rng.random(shape), np.float32)
    dequantize = helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["y"], **attributes)
    weight = single(tmp_path / "m.onnx", [dequantize], 1, codes=codes, scale=scale, zero_point=zero_point)
    expected = run_on_onnxruntime(tmp_path / "m.onnx", 1)
    values = weight.read().values_RC
    np.testing.assert_array_equal(values.T if form in ("per column", "blocks of columns") else values, expected)


@pytest.mark.parametrize("dtype", ["u8", "i8", "u4", "i4"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("with_zero_point", [False, True])
def test_compressed_constants_of_an_ir_are_read_as_openvino_reads_them(tmp_path, dtype, grouped, with_zero_point):
    rng = np.random.default_rng(4)
    shape = (OUTPUTS, 3, 16) if grouped else (OUTPUTS, 48)
    kind = getattr(openvino.Type, dtype)
    low = {"u": 0, "i": -(2 ** (int(dtype[1]) - 1))}[dtype[0]]
    codes = rng.integers(low, low + 2 ** int(dtype[1]), shape)

    def constant(values: np.ndarray):
        return opset13.convert(opset13.constant(values, kind), "f16")

    numbers = constant(codes)
    if with_zero_point:
        numbers = opset13.subtract(numbers, constant(codes.max(axis=-1, keepdims=True)))
    numbers = opset13.multiply(numbers, opset13.constant(rng.random((*shape[:-1], 1)).astype(np.float16)))
    numbers = opset13.convert(opset13.reshape(numbers, [OUTPUTS, 48], False), "f32")
    x = opset13.parameter([48, 48], np.float32)
    model = openvino.Model([opset13.matmul(x, numbers, False, True)], [x])
    openvino.serialize(model, tmp_path / "m.xml")
    (weight,) = ir_weights(tmp_path / "m.xml")
    assert (weight.bits, weight.block, weight.outputs_in_rows) == (int(dtype[1]), shape[-1], True)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = compiled(np.eye(48, dtype=np.float32))[0].T
    # Its constants are folded in float16.
    np.testing.assert_allclose(weight.read().values_RC, expected, rtol=2.0**-9, atol=2.0**-9)


def quantised(weight: np.ndarray, bits: int, block: int, *, zero_point_off: int = 0) -> Values:
    """A weight rounded to the nearest of codes that span each block, as plainly as can be."""
    starts = range(0, weight.shape[1], block)
    parts = [weight[:, start : start + block] for start in starts]
    low = np.stack([np.minimum(part.min(axis=1), 0) for part in parts], axis=1)
    high = np.stack([np.maximum(part.max(axis=1), 0) for part in parts], axis=1)
    scale = (high - low) / (2**bits - 1)
    zero_point = np.rint(-low / scale)
    wide_scale, wide_zero = (np.repeat(array, block, axis=1)[:, : weight.shape[1]] for array in (scale, zero_point))
    codes = np.clip(np.rint(weight / wide_scale) + wide_zero, 0, 2**bits - 1).astype(np.uint8)
    return dequantised(codes, bits, 0, scale.astype(np.float32), zero_point + zero_point_off, block)


def against(weight: np.ndarray, values: Values) -> Compared:
    return compare_values(weight, values, np.arange(len(weight)))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, INPUTS])
def test_rounding_to_the_nearest_code_is_quantised_and_a_zero_point_that_is_off_by_one_is_changed(bits, block):
    for seed in range(20):
        weight = random(seed)
        honest, off = (
            against(weight, quantised(weight, bits, block)),
            against(weight, quantised(weight, bits, block, zero_point_off=1)),
        )
        assert (honest.relation, off.relation) == ("quantised", "changed")


def test_one_block_with_the_scale_of_another_is_changed():
    weight, found = random(), quantised(random(), 4, 16)
    found.values_RC[3, :16] *= 1.5
    assert against(weight, found).relation == "changed"


def test_codes_of_another_matrix_are_changed():
    assert against(random(1), quantised(random(2), 4, 16)).relation == "changed"


def test_numbers_beyond_half_a_step_are_counted():
    weight, found = random(), quantised(random(), 8, 16)
    found.values_RC[3, 5] += 1.5 * found.grid.step_RB[3, 0] * np.sign(found.values_RC[3, 5] - weight[3, 5])
    compared = against(weight, found)
    assert (compared.relation, compared.different) == ("quantised", 1)
    assert 1.5 <= compared.worst_steps <= 2


def test_weights_in_a_format_that_is_not_read_back_are_refused_rather_than_missing(tmp_path):
    node = helper.make_node("MatMulFpQ4", ["x", "B", "shape"], ["y"], domain="com.microsoft")
    with pytest.raises(InputError, match="weights of MatMulFpQ4 cannot be read back"):
        single(tmp_path / "m.onnx", [node], INPUTS)
    x = opset13.parameter([48, 48], np.float32)
    codes = openvino.op.Constant(openvino.Type.nf4, openvino.Shape([48, 48]), [0.0] * 48 * 48)
    model = openvino.Model([opset13.matmul(x, opset13.convert(codes, "f32"), False, True)], [x])
    openvino.serialize(model, tmp_path / "m.xml")
    with pytest.raises(InputError, match="weights stored as nf4 cannot be read back"):
        list(ir_weights(tmp_path / "m.xml"))


def test_codes_of_bitsandbytes_that_do_not_fit_their_scales_are_refused_in_one_line(tmp_path):
    constants = {"B": np.zeros(600, np.uint8), "absmax": np.ones(7, np.float32)}
    sizes = {"K": INPUTS, "N": OUTPUTS, "quant_type": 0, "block_size": 16}
    node = helper.make_node("MatMulBnb4", ["x", *constants], ["y"], domain="com.microsoft", **sizes)
    with pytest.raises(InputError, match=r"its parts do not fit together .* found 600 and 7"):
        single(tmp_path / "m.onnx", [node], INPUTS, **constants).read()


@pytest.mark.parametrize(("bits", "scales"), [(3, 96), (4, 95)])
def test_codes_and_scales_that_do_not_fit_together_are_refused_in_one_line(tmp_path, bits, scales):
    sizes = {"K": INPUTS, "N": OUTPUTS, "bits": bits, "block_size": 16}
    node = helper.make_node("MatMulNBits", ["x", "B", "scales"], ["y"], domain="com.microsoft", **sizes)
    constants = {"B": np.zeros((OUTPUTS, 4, 8), np.uint8), "scales": np.ones(scales, np.float32)}
    with pytest.raises(InputError, match=r"m\.onnx: .*") as refused:
        single(tmp_path / "m.onnx", [node], INPUTS, **constants).read()
    assert "\n" not in str(refused.value)


def test_an_ir_whose_bin_is_cut_short_is_refused(tmp_path):
    x = opset13.parameter([48, 48], np.float32)
    model = openvino.Model([opset13.matmul(x, opset13.constant(random(0, 48, 48)), False, True)], [x])
    openvino.serialize(model, tmp_path / "m.xml")
    whole = (tmp_path / "m.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(whole[:-4])
    with pytest.raises(InputError, match=r"needs \d+ bytes of the .bin"):
        list(ir_weights(tmp_path / "m.xml"))
