"""Exports on OpenVINO itself: its own IR, stateful or with the past as inputs, and ONNX files that it converts."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refengine.codecs.openvino import openvino as stateful_cache
from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Past, Settings, Step
from verify.candidates.explain import in_words
from verify.candidates.onnx_file import OnnxFile, describe
from verify.candidates.openvino_file import IrFile, describe_ir, find_ir
from verify.errors import NoVerdict, RuntimeMissing
from verify.expect import EXACT, Expectation, expectations, int8_activations, joined
from verify.feeds import caches, check_logits, feed, next_past
from verify.interface import Declared, Interface, check_same_model, interface_of

INSTALL = 'pip install "tokenproof[openvino]"'
DEVICE = "device_type"  # the one option that is no property of a compiled model
# Kernels of every sequence length are kept otherwise, a third of a gigabyte each for a small model and 8 rows.
DEFAULTS: Mapping[str, Mapping[str, str]] = {"CPU": {"CPU_RUNTIME_CACHE_CAPACITY": "0"}}
STATE_NAME = re.compile(r"past_key_values\.(\d+)\.(key|value)")
CACHE_PRECISIONS = ("KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")
GROUP_SIZES = ("KEY_CACHE_GROUP_SIZE", "VALUE_CACHE_GROUP_SIZE")
ARITHMETICS: Mapping[str, str] = {"bf16": "bfloat16", "f16": "float16"}  # INFERENCE_PRECISION_HINT -> expectation
INTEGERS = frozenset(["u2", "u3", "u4", "i4", "u6", "u8", "i8"])  # weights may be stored as these
INTEGER_WEIGHTS = "integer_weights"  # in the settings: which of them are
NO_GROUP = 2**32  # the group size of "per token" is larger; it is not done on a CPU (2026.4)
NO_LAYERS = ("Const", "Input", "Output")  # of a compiled model: they compute nothing
UNREADABLE = ("u4", "u3")  # what such a state reads back as is not what attention reads (2026.4)


class OpenVinoCandidate:
    """An export compiled by OpenVINO; made by `open`.

    A stateful one keeps its past to itself: it goes on from its own last step or starts anew, and nothing else.
    """

    runtime = "openvino"

    def __init__(self, path: Path, interface: Interface, settings: Settings, config: Config, request: Any):
        self.path = path
        self.interface = interface
        self.settings = settings
        self._config = config
        self._request = request
        self._last: Past | None = None

    @classmethod
    def open(
        cls, path: str | Path, runtime: str, provider_options: Mapping[str, str], config: Config
    ) -> "OpenVinoCandidate":
        """Opens an export of the checkpoint with this configuration.

        Args:
            path: an `.xml` or `.onnx` file, or a directory that holds one.
            runtime: "openvino".
            provider_options: `device_type` (CPU by default), and properties of OpenVINO, passed on unchanged.
            config: the checkpoint's.

        Raises:
            InputError: the file cannot be used, or is an export of another model.
            RuntimeMissing: OpenVINO is not installed.
            NoVerdict: OpenVINO cannot compile it with these properties.
        """
        openvino = _import_openvino()
        file, model = _read(openvino, path, config)
        try:
            inputs, outputs = ([_declared(port) for port in ports] for ports in (model.inputs, model.outputs))
            interface = interface_of(inputs, outputs, is_stateful=bool(model.get_sinks()))
            # Compiled, a stateful model does not say what it keeps; its file does.
            shown = file.interface if isinstance(file, IrFile) else interface
            check_same_model(shown, config, file.query_heads(shown.resolved(config).head_dim))
        except InputError as error:
            raise InputError(f"{file.path}: {error}") from error
        _, request, settings = _compile(openvino, file.path, model, provider_options, config)
        return cls(file.path, interface.resolved(config), settings, config, request)

    @property
    def can_pad_left(self) -> bool:
        """Whether padding may stand in front of short rows: it is told positions and mask."""
        return self.interface.has_position_ids and self.interface.has_attention_mask and not self.interface.batch_size

    @property
    def can_merge(self) -> bool:
        """Whether its past can be handed over."""
        return not self.interface.is_stateful

    @property
    def expectation(self) -> Expectation:
        """What its settings say that it computes in, and that its cache is."""
        arithmetic = arithmetic_of(self.settings.effective)
        if not self.interface.is_stateful or self.interface.head_dim is None:
            return arithmetic
        return joined(arithmetic, expectation(self.settings, self.interface.head_dim))

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds new tokens (position -1 is left padding), after `past` if there is one: of a stateful export its last.

        Raises:
            NoVerdict: the export cannot take this batch, OpenVINO fails, or an output has another shape.
        """
        if self.interface.is_stateful and past is not None and past is not self._last:
            raise ValueError("a stateful export goes on from its own last step alone")
        try:
            if past is None:
                self._request.reset_state()
            fed = feed(self.interface, token_ids_BT, positions_BT, past)
            given = {
                name: np.array(array) for port, array in self._request.infer(fed).items() for name in port.get_names()
            }
            check_logits(given["logits"], token_ids_BT.shape, self.interface.vocab_size)
            self._last = next_past(self.interface, given, positions_BT, past) if self.interface.has_cache else None
        except (RuntimeError, NoVerdict) as error:
            raise NoVerdict(f"{self.path}: openvino failed: {in_words(str(error), self._config)}") from error
        return Step(given["logits"], self._last)

    def caches(self, past: Past) -> dict[str, np.ndarray]:
        """Keys and values after the last step, `x_BKSH` by trace point; none of a state that cannot be read back."""
        if not self.interface.is_stateful:
            return caches(self.interface, past)
        if any(self.settings.effective.get(name) in UNREADABLE for name in CACHE_PRECISIONS):
            return {}
        found = {}
        for state in self._request.query_state():
            if (name := STATE_NAME.match(state.name)) is not None:
                found[f"layers.{name[1]}.self_attn.{name[2][0]}_cache"] = np.array(state.state.data)
        return found


def arithmetic_of(effective: Mapping[str, Any]) -> Expectation:
    """What a model compiled with these properties computes in.

    Inputs of products with weights that are stored as integers become int8, in groups.
    """
    precision = ARITHMETICS.get(effective.get("INFERENCE_PRECISION_HINT", ""), EXACT.name)
    group = int(effective.get("DYNAMIC_QUANTIZATION_GROUP_SIZE", 0))
    if not effective[INTEGER_WEIGHTS] or not 0 < group < NO_GROUP:
        return expectations()[precision]
    return joined(expectations()[precision], int8_activations(group))


def expectation(settings: Settings, head_dim: int) -> Expectation:
    """The reference with the cache that a stateful attention on a CPU has with these settings."""
    precisions = [settings.effective.get(name) for name in CACHE_PRECISIONS]
    if precisions == ["f16", "f16"]:
        if settings.effective.get("INFERENCE_PRECISION_HINT") == "bf16":
            return EXACT  # what is computed in bfloat16 is kept in it
        return expectations()["ov-f16"]
    if settings.requested[DEVICE] != "CPU" or not set(precisions) <= {"u8", "u4"}:
        return EXACT
    key_group, value_group = (int(settings.effective[name]) or head_dim for name in GROUP_SIZES)
    by_channel = settings.requested.get("KEY_CACHE_QUANT_MODE") == "BY_CHANNEL"
    key_bits, value_bits = (8 if precision == "u8" else 4 for precision in precisions)
    scheme = stateful_cache(
        key_bits,
        value_bits,
        key_group=None if by_channel or key_group == head_dim else key_group,
        value_group=None if value_group == head_dim else value_group,
        by_channel=key_group if by_channel else 0,
    )
    named = next((known for known in expectations().values() if known.scheme == scheme), None)
    keys = f"{precisions[0]} keys{' by channel' if by_channel else ''} in groups of {key_group}"
    return named or Expectation(f"{keys}, {precisions[1]} values in groups of {value_group}", scheme)


def compiled_settings(path: Path, provider_options: Mapping[str, str]) -> Settings:
    """What OpenVINO says of an export that it has compiled, and, under "providers", of which layers it is made then.

    Raises:
        InputError: the file cannot be used.
        RuntimeMissing: OpenVINO is not installed.
        NoVerdict: OpenVINO cannot compile it with these properties.
    """
    openvino = _import_openvino()
    file, model = _read(openvino, path)
    compiled, _, settings = _compile(openvino, file.path, model, provider_options)
    layers = Counter(_layer_type(node) for node in compiled.get_runtime_model().get_ops())
    operators = {name: count for name, count in layers.most_common() if name not in NO_LAYERS}
    device = settings.requested[DEVICE]
    ran = {device: {"nodes": sum(operators.values()), "operators": operators}}
    return Settings(settings.requested, {**settings.effective, "providers": ran})


def _layer_type(node: Any) -> str:
    given = node.get_rt_info()["layerType"]
    return given if isinstance(given, str) else str(given.astype(str))


def _read(openvino: Any, path: str | Path, config: Config | None = None) -> tuple[IrFile | OnnxFile, Any]:
    ir = find_ir(path)
    file = describe_ir(ir) if ir else describe(path)
    try:
        # An ONNX file is converted, since reading alone leaves its attention unfused.
        return file, openvino.Core().read_model(file.path) if ir else openvino.convert_model(file.path)
    except RuntimeError as error:
        raise InputError(f"{file.path}: OpenVINO cannot read it: {in_words(str(error), config)}") from error
    except _conversion_failures() as error:  # operators that it does not have: whole, and of no use to it
        raise NoVerdict(f"{file.path}: openvino cannot convert it: {in_words(str(error), config)}") from error


def _conversion_failures() -> tuple[type[Exception], ...]:
    from openvino import frontend

    return (
        *(frontend.GeneralFailure, frontend.InitializationFailure, frontend.NotImplementedFailure),
        *(frontend.OpConversionFailure, frontend.OpValidationFailure),
    )


def _compile(
    openvino: Any, file: Path, model: Any, provider_options: Mapping[str, str], config: Config | None = None
) -> tuple[Any, Any, Settings]:
    """The compiled model, a request of it, and what it says of itself."""
    device = provider_options.get(DEVICE, "CPU")
    properties = {**DEFAULTS.get(device, {}), **provider_options}
    properties.pop(DEVICE, None)
    try:
        compiled = openvino.Core().compile_model(model, device, properties)
        request = compiled.create_infer_request()
    except RuntimeError as error:
        raise NoVerdict(f"{file}: openvino cannot compile it: {in_words(str(error), config)}") from error
    effective = {
        "openvino": openvino.__version__,
        **_properties(openvino, compiled),
        INTEGER_WEIGHTS: _integer_weights(model),
    }
    return compiled, request, Settings({DEVICE: device, **properties}, effective)


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


def _declared(port: Any) -> Declared:
    """An input or output under the name by which it is known, where it has several."""
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    dtype = port.get_element_type().to_dtype().name
    return Declared(port.get_any_name(), dtype, shape)


def _properties(openvino: Any, compiled: Any) -> dict[str, str]:
    """Every property that the compiled model lets be read, as text."""
    names = set(compiled.get_property("SUPPORTED_PROPERTIES")) - {"SUPPORTED_PROPERTIES"}
    values = {name: compiled.get_property(name) for name in sorted(names)}
    return {
        name: value.to_string() if isinstance(value, openvino.Type) else str(value) for name, value in values.items()
    }
