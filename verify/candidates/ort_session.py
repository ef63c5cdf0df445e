"""ONNX Runtime sessions: a provider by name, what it is given, and what it says of itself."""

import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Settings
from verify.candidates.explain import in_words
from verify.candidates.onnx_file import OnnxFile
from verify.errors import NoVerdict, RuntimeMissing

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
PROVIDERS: Mapping[str, tuple[str, Mapping[str, str]]] = {  # runtime -> provider, its options by default
    "ort-cpu": (CPU, {}),
    "ort-openvino": (OPENVINO, {"device_type": "CPU"}),
}
BY_NAME = "ort:"  # before a provider's own name, any other runtime of this kind
INSTALL = 'pip install "tokenproof[onnxruntime]"'
# OpenVINO's CPU plugin keeps the kernels of every sequence length it has met: without a cache that is one a step, and
# with SmolLM2 and 8 rows a third of a gigabyte each. What is computed does not depend on it.
NO_RUNTIME_CACHE = '{"CPU": {"CPU_RUNTIME_CACHE_CAPACITY": "0"}}'
OLDEST = (1, 24)  # the first that says which provider runs each node
WEIGHTS_BESIDE = "session.model_external_initializers_file_folder_path"  # of a model that comes as bytes
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
# Of norms in float16 that the CPU is to compute in float32, this optimiser of 1.24.1 makes a graph that cannot be
# opened; that of 1.31.1 does not. Source: https://github.com/microsoft/onnxruntime/issues/26717
FAILING_FUSION = "SimplifiedLayerNormFusion"
NARROW_HINTS: Mapping[str, str] = {"bf16": "bfloat16", "f16": "float16"}  # INFERENCE_PRECISION_HINT -> dtype
ERROR, FATAL = 3, 4  # severities of log messages
Level = Literal["disabled", "basic", "extended", "all"]  # of optimisation, each with those before it
LEVELS: Mapping[Level, str] = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def open_session(
    file: OnnxFile,
    runtime: str,
    provider_options: Mapping[str, str],
    config: Config | None = None,
    *,
    reuse_memory: bool = True,
    source: Path | bytes | None = None,
    level: Level = "all",
) -> tuple[Any, Settings]:
    """An ONNX Runtime session on a file, and what it says of itself.

    `Settings.effective` holds the version of ONNX Runtime, for each provider the options that it reports, the number
    of nodes that it runs, and their operators, and under "session" what had to be switched off for it to work.

    Args:
        file: described beforehand.
        runtime: "ort-cpu", "ort-openvino", or "ort:" and the name of a provider.
        provider_options: passed on unchanged; for OpenVINO `device_type` is CPU unless it is among them.
        config: the checkpoint's, to explain errors by.
        reuse_memory: of intermediate results, as their declared shapes allow it.
        source: what is opened in the file's place: a copy of its graph, or the bytes of one.
        level: how far ONNX Runtime may change the graph.

    Raises:
        InputError: ONNX Runtime finds the file invalid.
        RuntimeMissing: ONNX Runtime, or the provider, is not installed.
        NoVerdict: ONNX Runtime cannot open it.
    """
    provider, _ = provider_of(runtime)
    onnxruntime = _import_onnxruntime(runtime)
    requested = requested_of(runtime, provider_options)
    _refuse_bfloat16(file)
    # A provider that rejects its options says why in the default log and nowhere else.
    onnxruntime.set_default_logger_severity(ERROR)
    changed: dict[str, Any] = {} if reuse_memory else {"enable_mem_reuse": False}
    if level != "all":
        changed["graph_optimization_level"] = level
    providers = [(provider, requested)] if provider == CPU else [(provider, requested), (CPU, {})]
    try:
        try:
            session = _session(onnxruntime, source or file.path, file.path.parent, providers, changed)
        except errors() as error:
            if FAILING_FUSION not in str(error):
                raise
            changed["disabled_optimizers"] = [FAILING_FUSION]
            session = _session(onnxruntime, source or file.path, file.path.parent, providers, changed)
    except errors() as error:
        kind = InputError if _is_invalid_file(error) else NoVerdict
        raise kind(f"{file.path}: {runtime} cannot open it: {in_words(str(error), config)}") from error
    if provider not in session.get_providers():
        raise NoVerdict(
            f"{runtime}: {provider} does not accept {_option_text(requested)} on this machine "
            "(no such device, or a value that it does not know); change --provider-option"
        )
    return session, Settings(requested, {**_effective(onnxruntime, session), "session": changed})


def session_of(model: bytes) -> Any:
    """A session of a small model on the CPU provider, which leaves its graph as it is."""
    onnxruntime = _import_onnxruntime("ort-cpu")
    return _session(onnxruntime, model, Path(), [(CPU, {})], {"graph_optimization_level": "disabled"})


def provider_of(runtime: str) -> tuple[str, Mapping[str, str]]:
    """The provider that a runtime's name means, and its options by default."""
    if runtime in PROVIDERS:
        return PROVIDERS[runtime]
    named = runtime.removeprefix(BY_NAME)
    return named, dict(PROVIDERS.values()).get(named, {})


def requested_of(runtime: str, provider_options: Mapping[str, str]) -> dict[str, str]:
    """What its provider is asked for: these options, and what it is asked for by default."""
    provider, defaults = provider_of(runtime)
    requested = {**defaults, **provider_options}
    if provider == OPENVINO and requested["device_type"] == "CPU":
        requested.setdefault("load_config", NO_RUNTIME_CACHE)
    return requested


def openvino_precision(requested: Mapping[str, str]) -> str | None:
    """The narrow float that OpenVINO's provider is told to compute in, if any: it says nothing of what it does.

    On a CPU it computes in float32 unless told otherwise, and where float16 is asked for in bfloat16 if that is faster.
    """
    try:
        told = json.loads(requested.get("load_config", "{}"))
    except ValueError:
        return None
    device = told.get(requested["device_type"], {}) if isinstance(told, dict) else {}
    hint = device.get("INFERENCE_PRECISION_HINT") if isinstance(device, dict) else None
    narrow = NARROW_HINTS.get(str(hint))
    return "bfloat16" if narrow and requested["device_type"] == "CPU" else narrow


def refuse_idle_provider(runtime: str, settings: Settings) -> None:
    """Raises NoVerdict when a provider has left every node to the CPU's, as it does with a device that is not there."""
    provider, _ = provider_of(runtime)
    nodes = {name: said["nodes"] for name, said in settings.effective["providers"].items()}
    if not nodes[provider]:
        raise NoVerdict(
            f"{runtime}: {provider} runs none of the {sum(nodes.values())} nodes with "
            f"{_option_text(settings.requested) or 'no options'}, so there is nothing of it to judge; change "
            "--provider-option, or compare on ort-cpu"
        )


def errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes have no common base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = [value for value in vars(state).values() if isinstance(value, type)]
    return (RuntimeError, *(kind for kind in kinds if issubclass(kind, Exception)))


def openvino_libraries() -> list[Path]:
    """Directories with OpenVINO's libraries: of its package, or else those that its installer has named."""
    package = importlib.util.find_spec("openvino")
    inside = (package.submodule_search_locations if package else None) or ()
    named = os.environ.get("OPENVINO_LIB_PATHS", "").split(os.pathsep)
    of_package = [Path(place, "libs") for place in inside if Path(place, "libs").is_dir()]
    return of_package or [Path(place) for place in named if place and Path(place).is_dir()]


def _import_onnxruntime(runtime: str) -> Any:
    provider, _ = provider_of(runtime)
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
        remedy = f"pip uninstall onnxruntime, then {INSTALL}"
        if provider != OPENVINO:
            remedy = f"compare on one of those (--runtime {BY_NAME}{there[0]}), or install a build that has it"
        raise RuntimeMissing(
            f"{runtime}: the installed onnxruntime {onnxruntime.__version__} has {', '.join(there)}, "
            f"no {provider}: {remedy}"
        )
    if sys.platform == "win32" and provider == OPENVINO:  # there it comes without OpenVINO's libraries
        # Source: onnxruntime.tools.add_openvino_win_libs, v1.24.1
        for directory in openvino_libraries():
            os.environ["PATH"] = f"{directory}{os.pathsep}{os.environ['PATH']}"
            os.add_dll_directory(str(directory))
    return onnxruntime


def _session(
    onnxruntime: Any,
    source: Path | bytes,
    directory: Path,
    providers: list[tuple[str, Any]],
    changed: Mapping[str, Any],
) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL  # a failing run raises its text; logging would say it twice
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    options.enable_mem_reuse = changed.get("enable_mem_reuse", True)
    levels = onnxruntime.GraphOptimizationLevel.__members__
    options.graph_optimization_level = levels[LEVELS[changed.get("graph_optimization_level", "all")]]
    if isinstance(source, bytes):
        options.add_session_config_entry(WEIGHTS_BESIDE, str(directory))
    # Without fallback: otherwise a failing provider is silently replaced by the CPU's.
    return onnxruntime.InferenceSession(
        source,
        options,
        providers=providers,
        enable_fallback=0,
        disabled_optimizers=changed.get("disabled_optimizers"),
    )


def _is_invalid_file(error: Exception) -> bool:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    unknown = ("No Op registered", "is not a registered function/op", "Unrecognized attribute")
    if any(words in str(error) for words in unknown):
        return False  # an operator, or a kind of it, that this version of the runtime does not have
    return isinstance(error, state.InvalidProtobuf | state.InvalidGraph) or "Invalid model." in str(error)


def _refuse_bfloat16(file: OnnxFile) -> None:
    for declared in (*file.inputs, *file.outputs):
        if declared.dtype == "bfloat16":
            raise NoVerdict(
                f"{file.path}: {declared.name} is bfloat16, which ONNX Runtime does not exchange "
                "with NumPy; export it with float32 inputs and outputs"
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
