"""ONNX's grouped-query attention with a cache of codes, as a model of that one node, and who runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from refengine.codecs.static import Numbers
from refengine.config import Config
from tests.checkpoints import TINY

CONFIG = Config.from_dict(TINY | {"num_hidden_layers": 1, "head_dim": 16})
N, K, H = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
TYPES = {"int8": TensorProto.INT8, "int4": TensorProto.UINT8, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN}

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Arrays]  # the model's inputs -> its outputs, by name


@dataclass(frozen=True)
class Mode:
    """What a cache of codes can be."""

    numbers: Numbers
    per_channel: bool = False

    def __str__(self) -> str:
        return f"{self.numbers}-{'channel' if self.per_channel else 'tensor'}"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (1, K, 1, H) if self.per_channel else (1,)

    def empty(self) -> np.ndarray:
        """The cache before the first token."""
        shape, dtype = (1, K, 0, H // 2 if self.numbers == "int4" else H), helper.tensor_dtype_to_np_dtype
        return np.empty(shape, dtype(TYPES[self.numbers]))


def quantised_attention(path: Path, mode: Mode) -> Path:
    """Writes the node, with keys as they are given (not rotated), as a model of one row."""
    kind = "PER_CHANNEL" if mode.per_channel else "PER_TENSOR"
    inputs = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
    node = helper.make_node(
        "GroupQueryAttention",
        [*inputs, *[""] * 5, "k_scale", "v_scale"],
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=N,
        kv_num_heads=K,
        k_quant_type=kind,
        v_quant_type=kind,
        kv_cache_bit_width=4 if mode.numbers == "int4" else 8,
    )
    held = TYPES[mode.numbers], [1, K, "held", mode.empty().shape[-1]]
    types: dict[str, tuple[int, list[int | str]]] = {
        "query": (TensorProto.FLOAT, [1, "new", N * H]),
        "key": (TensorProto.FLOAT, [1, "new", K * H]),
        "value": (TensorProto.FLOAT, [1, "new", K * H]),
        "past_key": held,
        "past_value": held,
        "seqlens_k": (TensorProto.INT32, [1]),
        "total_sequence_length": (TensorProto.INT32, []),
        "k_scale": (TensorProto.FLOAT, [*mode.scale_shape]),
        "v_scale": (TensorProto.FLOAT, [*mode.scale_shape]),
    }
    outputs = {"output": types["query"], "present_key": held, "present_value": held}
    values = [
        [helper.make_tensor_value_info(name, *type_) for name, type_ in side.items()] for side in (types, outputs)
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        helper.make_model(helper.make_graph([node], "attention", *values), opset_imports=opsets, ir_version=10), path
    )
    return path


def on_onnxruntime(path: Path) -> Run:
    """ONNX Runtime's CPU provider, from 1.27 on."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(names, dict(given)), strict=True))


def _tensor(array: np.ndarray) -> Any:
    from openvino import Tensor, Type

    if array.dtype == ml_dtypes.float8_e4m3fn:  # of this the runtime knows the bytes only
        return Tensor(array.view(np.uint8), array.shape, Type.f8e4m3)
    return Tensor(array)


def _array(tensor: Any) -> np.ndarray:
    from openvino import Type

    array = tensor.data.copy()
    return array.view(ml_dtypes.float8_e4m3fn) if tensor.element_type == Type.f8e4m3 else array


def on_openvino(path: Path) -> Run:
    """OpenVINO's CPU plugin."""
    import openvino

    request = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def run(given: Arrays) -> Arrays:
        for name, array in given.items():
            request.set_tensor(name, _tensor(array))
        request.infer()
        return {name: _array(request.get_tensor(name)) for name in ("output", "present_key", "present_value")}

    return run


RUNTIMES: Mapping[str, Callable[[Path], Run]] = {"openvino": on_openvino, "onnxruntime": on_onnxruntime}
INTEGERS = [Mode(numbers, per_channel) for numbers in ("int8", "int4") for per_channel in (False, True)]
MODES = {"openvino": [*INTEGERS, Mode("float8_e4m3fn")], "onnxruntime": INTEGERS}  # what each can hold
# An ONNX Runtime that knows this kind of cache shares no environment with onnxruntime-openvino, nor does it need this
# one: `python -m tests.runtime_environments` makes one of its own.
HERE = "openvino" if find_spec("openvino") else "onnxruntime"
