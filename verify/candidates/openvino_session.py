"""OpenVINO itself: how a model is read and compiled, and what it says of itself then."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Settings
from verify.candidates.explain import in_words
from verify.candidates.onnx_file import OnnxFile, describe
from verify.candidates.openvino_file import IrFile, describe_ir, find_ir
from verify.errors import NoVerdict, RuntimeMissing
from verify.interface import Declared

INSTALL = 'pip install "tokenproof[openvino]"'
DEVICE = "device_type"  # the one option that is no property of a compiled model
# Kernels of every sequence length are kept otherwise, a third of a gigabyte each for a small model and 8 rows.
DEFAULTS: Mapping[str, Mapping[str, str]] = {"CPU": {"CPU_RUNTIME_CACHE_CAPACITY": "0"}}
INTEGERS = frozenset(["u2", "u3", "u4", "i4", "u6", "u8", "i8"])  # weights may be stored as these
INTEGER_WEIGHTS = "integer_weights"  # in the settings: which of them are
PLAIN: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
BFLOAT16 = "bf16"  # OpenVINO's name of it
NO_LAYERS = ("Const", "Input", "Output")  # of a compiled model: they compute nothing


def compiled_settings(path: Path, provider_options: Mapping[str, str]) -> Settings:
    """What OpenVINO says of an export that it has compiled, and, under "providers", of which layers it is made then.

    Raises:
        InputError: the file cannot be used.
        RuntimeMissing: OpenVINO is not installed.
        NoVerdict: OpenVINO cannot compile it with these properties.
    """
    file = described(path)
    request, settings = compiled(file.path, model_of(file.path), provider_options)
    layers = Counter(_text(node, "layerType") for node in _runtime_model(request).get_ops())
    operators = {name: count for name, count in layers.most_common() if name not in NO_LAYERS}
    device = settings.requested[DEVICE]
    ran = {device: {"nodes": sum(operators.values()), "operators": operators}}
    return Settings(settings.requested, {**settings.effective, "providers": ran})


def fused_in(request: Any) -> list[list[str]]:
    """Of each operator of the compiled model: those of the model that it is, by their names."""
    return [_text(node, "originalLayersNames").split(",") for node in _runtime_model(request).get_ops()]


def _runtime_model(request: Any) -> Any:
    return request.get_compiled_model().get_runtime_model()


def _text(node: Any, name: str) -> str:
    given = node.get_rt_info()[name]
    return given if isinstance(given, str) else str(given.astype(str))


def described(path: str | Path) -> IrFile | OnnxFile:
    """What an export says of itself. Raises InputError when it cannot be used, RuntimeMissing without OpenVINO."""
    _import_openvino()
    ir = find_ir(path)
    return describe_ir(ir) if ir else describe(path)


def model_of(file: Path, config: Config | None = None) -> Any:
    """OpenVINO's model of an `.xml` or `.onnx` file.

    Raises:
        InputError: the file cannot be read.
        NoVerdict: OpenVINO cannot convert it.
    """
    openvino = _import_openvino()
    try:
        # An ONNX file is converted, since reading alone leaves its attention unfused.
        return openvino.Core().read_model(file) if find_ir(file) else openvino.convert_model(file)
    except RuntimeError as error:
        raise InputError(f"{file}: OpenVINO cannot read it: {in_words(str(error), config)}") from error
    except _conversion_failures() as error:  # operators that it does not have: whole, and of no use to it
        raise NoVerdict(f"{file}: openvino cannot convert it: {in_words(str(error), config)}") from error


def _conversion_failures() -> tuple[type[Exception], ...]:
    from openvino import frontend

    return (
        *(frontend.GeneralFailure, frontend.InitializationFailure, frontend.NotImplementedFailure),
        *(frontend.OpConversionFailure, frontend.OpValidationFailure),
    )


def compiled(
    file: Path, model: Any, provider_options: Mapping[str, str], config: Config | None = None
) -> tuple[Any, Settings]:
    """A request of the compiled model, and what that says of itself. Raises NoVerdict when it cannot be compiled."""
    openvino = _import_openvino()
    device = provider_options.get(DEVICE, "CPU")
    properties = {**DEFAULTS.get(device, {}), **provider_options}
    properties.pop(DEVICE, None)
    try:
        request = openvino.Core().compile_model(model, device, properties).create_infer_request()
    except RuntimeError as error:
        raise NoVerdict(f"{file}: openvino cannot compile it: {in_words(str(error), config)}") from error
    effective = {
        "openvino": openvino.__version__,
        **_properties(openvino, request.get_compiled_model()),
        INTEGER_WEIGHTS: _integer_weights(model),
    }
    return _Request(request), Settings({DEVICE: device, **properties}, effective)


class _Request:
    """A request with bfloat16, which NumPy lacks, as ml_dtypes': OpenVINO exchanges its bits under float16's name."""

    def __init__(self, request: Any):
        self._request = request
        self.reset_state: Callable[[], None] = request.reset_state
        self.query_state: Callable[[], Any] = request.query_state
        self.get_compiled_model: Callable[[], Any] = request.get_compiled_model

    def infer(self, fed: Mapping[str, np.ndarray]) -> dict[Any, np.ndarray]:
        """As a request does it."""
        bits = {name: array.view(np.float16) if array.dtype == bfloat16 else array for name, array in fed.items()}
        return {
            port: array.view(bfloat16) if port.get_element_type().to_string() == BFLOAT16 else array
            for port, array in self._request.infer(bits).items()
        }


def _integer_weights(model: Any) -> list[str]:
    """The types of integer, if any, that matrices are stored as and converted from."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    matrices = [node for node in constants if len(node.get_output_shape(0)) > 1]
    found = {
        node.get_element_type().to_string()
        for node in matrices
        if any(user.get_node().get_type_name() == "Convert" for user in node.output(0).get_target_inputs())
    }
    return sorted(found & INTEGERS)


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise RuntimeMissing(f"openvino cannot be imported ({error}): {INSTALL}") from error
    return openvino


def declared(port: Any) -> Declared:
    """An input or output under the name by which it is known, where it has several."""
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    kind = port.get_element_type()
    dtype = bfloat16.__name__ if kind.to_string() == BFLOAT16 else kind.to_dtype().name
    return Declared(port.get_any_name(), dtype, shape)


def _properties(openvino: Any, compiled: Any) -> dict[str, str]:
    """Every property that the compiled model lets be read, as text."""
    names = set(compiled.get_property("SUPPORTED_PROPERTIES")) - {"SUPPORTED_PROPERTIES"}
    values = {name: compiled.get_property(name) for name in sorted(names)}
    return {
        name: value.to_string() if isinstance(value, openvino.Type) else str(value) for name, value in values.items()
    }


def cut(fed: Mapping[str, Any], given: Sequence[Any]) -> Any:
    """What makes some tensors of others, as a model of its own, which takes the others in any shape.

    The model that they are of is of no use any more.

    Args:
        fed: the others, by the names of the inputs of the new model.
        given: its outputs.

    Raises:
        NoVerdict: they are not made of the others alone.
    """
    from openvino import Model, PartialShape, opset13

    parameters = []
    for name, port in fed.items():
        rank = port.get_partial_shape().rank
        shape = PartialShape([-1] * rank.get_length()) if rank.is_static else PartialShape.dynamic()
        parameters.append(opset13.parameter(shape, port.get_element_type(), name))
        parameters[-1].output(0).set_names({name})
        for reader in port.get_target_inputs():
            reader.replace_source_output(parameters[-1].output(0))
    results = [opset13.result(port, name=f"given by {port.get_node().get_friendly_name()}") for port in given]
    try:
        return Model(results, parameters, "part")
    except RuntimeError as error:
        raise NoVerdict(f"a part of the graph reads more than was looked at: {in_words(str(error), None)}") from error


def save(model: Any, path: Path) -> None:
    """Writes an `.xml` and the `.bin` beside it, with weights as they are."""
    _import_openvino().save_model(model, path, compress_to_fp16=False)


def _has_bfloat16(part: Any) -> bool:
    """Whether it is fed or gives bfloat16, which OpenVINO would misread from NumPy's arrays."""
    return any(port.get_element_type().to_string() == BFLOAT16 for port in (*part.inputs, *part.outputs))


def _plainly(part: Any, fed: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """A model's results in float32 on the CPU; None where it cannot be run."""
    openvino = _import_openvino()
    if _has_bfloat16(part):
        return None
    try:
        results = openvino.Core().compile_model(part, "CPU", PLAIN)(list(fed))
    except RuntimeError:
        return None
    return [np.array(array) for array in results.values()]


def _by_reference(part: Any, fed: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The same of the implementations that OpenVINO itself is tested with; None where it has none."""
    openvino = _import_openvino()
    if _has_bfloat16(part):
        return None
    results = [openvino.Tensor(port.get_element_type(), openvino.Shape([])) for port in part.outputs]
    try:
        part.evaluate(results, [openvino.Tensor(array) for array in fed])
    except RuntimeError:
        return None
    return [np.array(tensor.data) for tensor in results]


REFERENCE = "OpenVINO's reference"
ALONE: Mapping[str, Callable[..., list[np.ndarray] | None]] = {"CPU": _plainly, REFERENCE: _by_reference}
