"""Exports on ONNX Runtime: its own CPU provider, or the OpenVINO execution provider."""

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Past, Settings, Step
from verify.candidates.explain import in_words
from verify.candidates.onnx_file import OnnxFile, describe
from verify.errors import NoVerdict, RuntimeMissing
from verify.expect import EXACT
from verify.feeds import caches, check_logits, feed, next_past
from verify.interface import Interface, check_same_model, interface_of

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
PROVIDERS: Mapping[str, tuple[str, Mapping[str, str]]] = {  # runtime -> provider, its options by default
    "ort-cpu": (CPU, {}),
    "ort-openvino": (OPENVINO, {"device_type": "CPU"}),
}
INSTALL = 'pip install "tokenproof[onnxruntime]"'
# OpenVINO's CPU plugin keeps the kernels of every sequence length it has met: without a cache that is one a step, and
# with SmolLM2 and 8 rows a third of a gigabyte each. What is computed does not depend on it.
NO_RUNTIME_CACHE = '{"CPU": {"CPU_RUNTIME_CACHE_CAPACITY": "0"}}'
OLDEST = (1, 24)  # the first that says which provider runs each node
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
ERROR, FATAL = 3, 4  # severities of log messages


class OrtCandidate:
    """An ONNX export in one ONNX Runtime session; made by `open`."""

    expectation = EXACT
    can_merge = True

    def __init__(
        self,
        runtime: str,
        file: OnnxFile,
        interface: Interface,
        settings: Settings,
        config: Config,
        session: Any,
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
            provider_options: passed on unchanged; for OpenVINO `device_type` is CPU unless it is among them.
            config: the checkpoint's.

        Raises:
            InputError: the file cannot be used, or is an export of another model.
            RuntimeMissing: ONNX Runtime, or the provider, is not installed.
            NoVerdict: ONNX Runtime cannot open it, or the provider would run none of it.
        """
        file = describe(path)
        try:
            interface = interface_of(file.inputs, file.outputs)
            check_same_model(interface, config, file.query_heads(interface.resolved(config).head_dim))
        except InputError as error:
            raise InputError(f"{file.path}: {error}") from error
        session, settings = open_session(file, runtime, provider_options, config)
        _refuse_idle_provider(runtime, settings)
        return cls(runtime, file, interface.resolved(config), settings, config, session)

    @property
    def can_pad_left(self) -> bool:
        """Whether padding may stand in front of short rows: it is fed positions and mask and goes by them."""
        # GroupQueryAttention takes the mask's sum for a length, so it reads any padding as standing behind.
        told = self.interface.has_position_ids and self.interface.has_attention_mask
        goes_by_it = "com.microsoft.GroupQueryAttention" not in self.file.operators
        return told and goes_by_it and self.interface.batch_size is None

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds new tokens (position -1 is left padding), after `past` if there is one.

        Returns:
            Logits of every new token, or of the last alone where the export gives no others.

        Raises:
            NoVerdict: the export cannot take this batch, the runtime fails, or an output has another shape.
        """
        if (positions_BT < 0).any() and not self.can_pad_left:
            raise NoVerdict(
                f"{self.path}: this export cannot be fed left padding; compare one prompt at a time (--batch-size 1)"
            )
        names = ["logits", *(name_out for _, name_out in self.interface.carried)]
        failures: tuple[type[Exception], ...] = (NoVerdict, *_errors())
        try:
            fed = feed(self.interface, token_ids_BT, positions_BT, past)
            given = dict(zip(names, self._session.run(names, fed), strict=True))
            check_logits(given["logits"], token_ids_BT.shape, self.interface.vocab_size)
            kept = next_past(self.interface, given, positions_BT, past) if self.interface.has_cache else None
        except failures as error:
            words = in_words(str(error), self._config)
            raise NoVerdict(f"{self.path}: {self.runtime} failed: {words}") from error
        return Step(np.array(given["logits"]), kept)

    def caches(self, past: Past) -> dict[str, np.ndarray]:
        """Keys and values that the last step gave, `x_BKSH` by trace point."""
        return caches(self.interface, past)


def open_session(
    file: OnnxFile, runtime: str, provider_options: Mapping[str, str], config: Config | None = None
) -> tuple[Any, Settings]:
    """An ONNX Runtime session on a file, and what it says of itself.

    `Settings.effective` holds the version of ONNX Runtime, and for each provider the options that it reports,
    the number of nodes that it runs, and their operators.

    Raises:
        InputError: ONNX Runtime finds the file invalid.
        RuntimeMissing: ONNX Runtime, or the provider, is not installed.
        NoVerdict: ONNX Runtime cannot open it.
    """
    provider, defaults = PROVIDERS[runtime]
    onnxruntime = _import_onnxruntime(runtime)
    requested = {**defaults, **provider_options}
    if provider == OPENVINO and requested["device_type"] == "CPU":
        requested.setdefault("load_config", NO_RUNTIME_CACHE)
    _refuse_bfloat16(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL  # a failing run raises its text; logging would say it twice
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    # A provider that rejects its options says why in the default log and nowhere else.
    onnxruntime.set_default_logger_severity(ERROR)
    providers = [(provider, requested)] if provider == CPU else [(provider, requested), (CPU, {})]
    try:
        # Without fallback: otherwise a failing provider is silently replaced by the CPU's.
        session = onnxruntime.InferenceSession(file.path, options, providers=providers, enable_fallback=0)
    except _errors() as error:
        kind = InputError if _is_invalid_file(error) else NoVerdict
        raise kind(f"{file.path}: {runtime} cannot open it: {in_words(str(error), config)}") from error
    if provider not in session.get_providers():
        raise NoVerdict(
            f"{runtime}: {provider} does not accept {_option_text(requested)} on this machine "
            "(no such device, or a value that it does not know); change --provider-option"
        )
    return session, Settings(requested, _effective(onnxruntime, session))


def openvino_libraries() -> list[Path]:
    """Directories with OpenVINO's libraries: of its package, or else those that its installer has named."""
    package = importlib.util.find_spec("openvino")
    inside = (package.submodule_search_locations if package else None) or ()
    named = os.environ.get("OPENVINO_LIB_PATHS", "").split(os.pathsep)
    of_package = [Path(place, "libs") for place in inside if Path(place, "libs").is_dir()]
    return of_package or [Path(place) for place in named if place and Path(place).is_dir()]


def _import_onnxruntime(runtime: str) -> Any:
    provider = PROVIDERS[runtime][0]
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(f"{runtime}: onnxruntime cannot be imported ({error}): {INSTALL}") from error
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < OLDEST:
        raise RuntimeMissing(
            f"{runtime}: expected onnxruntime {'.'.join(map(str, OLDEST))} or newer, "
            f"found {onnxruntime.__version__}: {INSTALL}"
        )
    there = onnxruntime.get_available_providers()
    if provider not in there:
        raise RuntimeMissing(
            f"{runtime}: the installed onnxruntime has {', '.join(there)}, no {provider}: "
            f"pip uninstall onnxruntime, then {INSTALL}"
        )
    if sys.platform == "win32" and provider == OPENVINO:  # there it comes without OpenVINO's libraries
        # Source: onnxruntime.tools.add_openvino_win_libs, v1.24.1
        for directory in openvino_libraries():
            os.environ["PATH"] = f"{directory}{os.pathsep}{os.environ['PATH']}"
            os.add_dll_directory(str(directory))
    return onnxruntime


def _errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes have no common base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [value for value in vars(state).values() if isinstance(value, type)]
    return (RuntimeError, *(kind for kind in kinds if issubclass(kind, Exception)))


def _is_invalid_file(error: Exception) -> bool:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if "No Op registered" in str(error) or "is not a registered function/op" in str(error):
        return False  # an operator that this version of the runtime does not have
    return isinstance(error, state.InvalidProtobuf | state.InvalidGraph) or "Invalid model." in str(error)


def _refuse_bfloat16(file: OnnxFile) -> None:
    for declared in (*file.inputs, *file.outputs):
        if declared.dtype == "bfloat16":
            raise NoVerdict(
                f"{file.path}: {declared.name} is bfloat16, which ONNX Runtime does not exchange "
                "with NumPy; export it with float32 inputs and outputs"
            )


def _refuse_idle_provider(runtime: str, settings: Settings) -> None:
    """With some options, such as a device that it has not, a provider leaves every node to the CPU's."""
    provider = PROVIDERS[runtime][0]
    nodes = {name: said["nodes"] for name, said in settings.effective["providers"].items()}
    if not nodes[provider]:
        raise NoVerdict(
            f"{runtime}: {provider} runs none of the {sum(nodes.values())} nodes with "
            f"{_option_text(settings.requested)}, so there is nothing of it to judge; change "
            "--provider-option, or compare on ort-cpu"
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
