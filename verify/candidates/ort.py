"""Exports on ONNX Runtime: its own CPU provider, or the OpenVINO execution provider."""

import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Past, Settings, Step
from verify.candidates.onnx_file import OnnxFile, read_onnx
from verify.errors import NoVerdict, RuntimeMissing
from verify.feeds import QUERY_HEADS_FOR_KV_HEADS, Interface, check_same_model, feed, interface_of, next_past

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
PROVIDERS: Mapping[
    str, tuple[str, Mapping[str, str]]
] = {  # runtime -> provider, and its options unless others are given
    "ort-cpu": (CPU, {}),
    "ort-openvino": (OPENVINO, {"device_type": "CPU"}),
}
INSTALL = 'pip install "tokenproof[onnxruntime]"'
OLDEST = (1, 24)  # the first that says which provider runs each node
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
FATAL, ERROR = 4, 3  # severities: a failing run raises its text, so that logging it says it twice
# Two sizes that do not fit each other, as runtimes write them: "Expected size 32 but got size 8", "Got: 9 Expected: 3",
# "mismatched dimensions of 3 and 9", "9 by 3", "3 vs 9"; and two shapes, "{1,9,4,64},{1,3,1,64}".
TWO_SIZES = re.compile(
    r"(?i)expected(?: size)?:? (\d+),? but got(?: size)?:? (\d+)|got:? (\d+),? expected:? (\d+)"
    r"|dimensions of (\d+) and (\d+)|(\d+) by (\d+)|(\d+) vs\.? (\d+)|(\d+) != (\d+)"
)
SHAPE = re.compile(r"[{\[(](\d+(?:, ?\d+)+)[}\])]")


class OrtCandidate:
    """An ONNX export in one ONNX Runtime session; made by `open`."""

    def __init__(
        self,
        runtime: str,
        file: OnnxFile,
        interface: Interface,
        config: Config,
        session: Any,
        settings: Settings,
    ):
        self.runtime = runtime
        self.file = file
        self.path = file.path
        self.interface = interface
        self.settings = settings
        self._config = config
        self._session = session

    @classmethod
    def open(
        cls, path: str | Path, runtime: str, provider_options: Mapping[str, str], config: Config
    ) -> "OrtCandidate":
        """Opens an export of the checkpoint with this configuration.

        Args:
            path: an `.onnx` file, or a directory that holds one.
            runtime: "ort-cpu" or "ort-openvino".
            provider_options: passed on unchanged; for OpenVINO, `device_type` is CPU unless it is among them.
            config: the checkpoint's.

        Raises:
            InputError: the file cannot be used, or is an export of another model.
            RuntimeMissing: ONNX Runtime, or the provider, is not installed.
            NoVerdict: ONNX Runtime cannot open it.
        """
        file = read_onnx(path)
        try:
            interface = interface_of(file.inputs, file.outputs)
            check_same_model(interface, config, file.query_heads(interface.resolved(config).head_dim))
        except InputError as error:
            raise InputError(f"{file.path}: {error}") from error
        session, settings = open_session(file, runtime, provider_options, config)
        _refuse_idle_provider(runtime, settings)
        return cls(runtime, file, interface.resolved(config), config, session, settings)

    @property
    def can_pad_left(self) -> bool:
        """Whether padding may stand in front of short rows: positions and mask are fed, and attention goes by them."""
        # GroupQueryAttention takes the sum of the mask for a length, and so reads any padding as standing behind.
        told = self.interface.has_position_ids and self.interface.has_attention_mask
        return (
            told
            and self.interface.batch_size is None
            and "com.microsoft.GroupQueryAttention" not in self.file.operators
        )

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds new tokens (position -1 is left padding), after `past` if there is one.

        Raises:
            NoVerdict: the export cannot take this batch, the runtime fails, or an output has an unexpected shape.
        """
        if (positions_BT < 0).any() and not self.can_pad_left:
            raise NoVerdict(
                f"{self.path}: this export cannot be fed left padding; compare one prompt at a time (--batch-size 1)"
            )
        names = ["logits", *(name_out for _, name_out in self.interface.carried)]
        fed = feed(self.interface, token_ids_BT, positions_BT, past)
        try:
            given = dict(zip(names, self._session.run(names, fed), strict=True))
        except _errors() as error:
            raise NoVerdict(
                f"{self.path}: {self.runtime} failed: {_in_words(error, self._config)}"
            ) from error
        expected = (*token_ids_BT.shape, self.interface.vocab_size)
        if given["logits"].shape != expected:
            raise NoVerdict(
                f"{self.path}: logits: expected shape {expected} (rows, new tokens, vocabulary), found {given['logits'].shape}; "
                "export it with logits for every token"
            )
        try:
            kept = next_past(self.interface, given, positions_BT, past) if self.interface.has_cache else None
        except NoVerdict as error:
            raise NoVerdict(f"{self.path}: {_in_words(error, self._config)}") from error
        return Step(np.array(given["logits"]), kept)


def open_session(
    file: OnnxFile, runtime: str, provider_options: Mapping[str, str], config: Config | None = None
) -> tuple[Any, Settings]:
    """An ONNX Runtime session on a file, and what it says of itself.

    `effective` holds the version of ONNX Runtime, and for each provider the options that it reports, the number of nodes that it
    runs and their operators.

    Raises:
        InputError: ONNX Runtime finds the file invalid.
        RuntimeMissing, NoVerdict: as `OrtCandidate.open`.
    """
    provider, defaults = PROVIDERS[runtime]
    onnxruntime = _import_onnxruntime(runtime)
    requested = {**defaults, **provider_options}
    _refuse_bfloat16(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    # A provider that rejects its options says why in the default log and nowhere else.
    onnxruntime.set_default_logger_severity(ERROR)
    providers = [(provider, requested)] if provider == CPU else [(provider, requested), (CPU, {})]
    try:
        # Without fallback: otherwise a failing provider is silently replaced by the CPU.
        session = onnxruntime.InferenceSession(file.path, options, providers=providers, enable_fallback=0)
    except _errors() as error:
        kind = InputError if _is_invalid_file(error) else NoVerdict
        raise kind(f"{file.path}: {runtime} cannot open it: {_in_words(error, config)}") from error
    if provider not in session.get_providers():
        raise NoVerdict(
            f"{runtime}: {provider} does not accept {_option_text(requested)} on this machine (no such device, or a value that it does not know); "
            "change --provider-option"
        )
    return session, Settings(requested, _effective(onnxruntime, session))


def explain_failure(message: str, config: Config) -> str:
    """What two sizes that do not fit, in a runtime's message, say about the export; empty when they say nothing."""
    sizes = {frozenset(int(size) for size in match.groups() if size) for match in TWO_SIZES.finditer(message)}
    shapes = [tuple(int(size) for size in shape.split(",")) for shape in SHAPE.findall(message)]
    for one, other in zip(shapes, shapes[1:], strict=False):
        if len(one) == len(other):
            sizes |= {frozenset(pair) for pair in zip(one, other, strict=True)}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads != kv_heads and {heads, kv_heads} in sizes:
        return (
            f"{heads} is num_attention_heads and {kv_heads} num_key_value_heads: {QUERY_HEADS_FOR_KV_HEADS}"
        )
    derived = config.hidden_size // heads
    if derived != config.head_dim and {derived, config.head_dim} in sizes:
        return (
            f"{derived} is hidden_size / num_attention_heads and {config.head_dim} the checkpoint's head_dim: the exporter worked out the "
            "head size where it should have read it; export it again with head_dim"
        )
    return ""


def openvino_libraries() -> list[Path]:
    """Directories of OpenVINO's libraries: those of the `openvino` package, or else what its installer's setup has named."""
    package = importlib.util.find_spec("openvino")
    of_package = [
        Path(place) / "libs" for place in (package.submodule_search_locations if package else None) or ()
    ]
    of_installer = [
        Path(place) for place in os.environ.get("OPENVINO_LIB_PATHS", "").split(os.pathsep) if place
    ]
    return [place for place in of_package if place.is_dir()] or [
        place for place in of_installer if place.is_dir()
    ]


def _import_onnxruntime(runtime: str) -> Any:
    provider = PROVIDERS[runtime][0]
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(f"{runtime}: onnxruntime cannot be imported ({error}): {INSTALL}") from error
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < OLDEST:
        raise RuntimeMissing(
            f"{runtime}: expected onnxruntime {'.'.join(map(str, OLDEST))} or newer, found {onnxruntime.__version__}: {INSTALL}"
        )
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeMissing(
            f"{runtime}: the installed onnxruntime has no {provider}, it has {', '.join(onnxruntime.get_available_providers())}: "
            f"pip uninstall onnxruntime, then {INSTALL}"
        )
    if (
        sys.platform == "win32" and provider == OPENVINO
    ):  # there the provider does not bring OpenVINO's libraries with it
        # Source: onnxruntime.tools.add_openvino_win_libs, v1.24.1
        for directory in openvino_libraries():
            os.environ["PATH"] = f"{directory}{os.pathsep}{os.environ['PATH']}"
            os.add_dll_directory(str(directory))
    return onnxruntime


def _errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes have no common base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        RuntimeError,
        *(
            value
            for value in vars(state).values()
            if isinstance(value, type) and issubclass(value, Exception)
        ),
    )


def _is_invalid_file(error: Exception) -> bool:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if "No Op registered" in str(error) or "is not a registered function/op" in str(error):
        return False  # an operator that this version of the runtime does not have
    return isinstance(error, state.InvalidProtobuf | state.InvalidGraph) or "Invalid model." in str(error)


def _in_words(error: Exception, config: Config | None) -> str:
    """The runtime's message on one line, without its source locations, and an explanation where there is one."""
    message = " ".join(str(error).split())
    explanation = explain_failure(message, config) if config else ""
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message).rpartition("[OpenVINO-EP] ")[2]
    message = re.sub(r"/\S+\.(?:cc|h):\d+ ", "", message)
    short = message if len(message) <= 400 else f"{message[:400]}..."
    return f"{short}: {explanation}" if explanation else short


def _refuse_bfloat16(file: OnnxFile) -> None:
    for declared in (*file.inputs, *file.outputs):
        if declared.dtype == "bfloat16":
            raise NoVerdict(
                f"{file.path}: {declared.name} is bfloat16, which ONNX Runtime does not exchange with NumPy; export it with float32 "
                "inputs and outputs"
            )


def _refuse_idle_provider(runtime: str, settings: Settings) -> None:
    """With some options, such as a device that it does not know, a provider is there but leaves every node to the CPU's."""
    provider = PROVIDERS[runtime][0]
    nodes = {name: said["nodes"] for name, said in settings.effective["providers"].items()}
    if not nodes[provider]:
        raise NoVerdict(
            f"{runtime}: {provider} runs none of the {sum(nodes.values())} nodes with {_option_text(settings.requested)}, so there is "
            "nothing of it to judge; change --provider-option, or compare on ort-cpu"
        )


def _option_text(options: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _effective(onnxruntime: Any, session: Any) -> dict[str, Any]:
    operators: dict[str, Counter[str]] = {provider: Counter() for provider in session.get_providers()}
    for subgraph in session.get_provider_graph_assignment_info():
        operators[subgraph.ep_name].update(node.op_type for node in subgraph.get_nodes())
    reported = session.get_provider_options()
    return {
        "onnxruntime": onnxruntime.__version__,
        "providers": {
            provider: {
                "options": dict(reported.get(provider, {})),
                "nodes": count.total(),
                "operators": dict(count.most_common()),
            }
            for provider, count in operators.items()
        },
    }
