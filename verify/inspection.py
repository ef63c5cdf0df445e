"""What an export is, for `python -m verify inspect`."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refengine.checkpoint import Checkpoint
from refengine.errors import InputError
from refengine.weights import check_names_and_shapes
from verify.candidates import Settings
from verify.candidates.checkpoint_file import CheckpointFile
from verify.candidates.files import describe_candidate
from verify.candidates.onnx_file import OnnxFile
from verify.candidates.onnx_weights import onnx_weights
from verify.candidates.openvino_file import IrFile
from verify.candidates.openvino_weights import ir_weights
from verify.interface import Declared, Interface, interface_of
from verify.report.weights import WeightsReport
from verify.weights.exported import ExportedCheckpoint
from verify.weights.match import match
from verify.workers.worker import Worker


@dataclass(frozen=True)
class Inspection:
    """What an export says of itself and, with a runtime, what that does with it.

    Attributes:
        file: the file and what is in it.
        interface: None when the export is no decoder that can be fed.
        why_not: then says why, in one line.
        query_heads: None where the graph does not show it.
        runtime: None when none was asked for.
        settings: what the runtime says that it does; None without one.
    """

    file: OnnxFile | IrFile
    interface: Interface | None
    why_not: str | None
    query_heads: int | None
    runtime: str | None
    settings: Settings | None


def inspect(
    path: str | Path, runtime: str | None = None, provider_options: Mapping[str, str] | None = None
) -> Inspection:
    """Reads an export without its checkpoint; with a runtime, opens it there to see who runs what.

    Raises:
        InputError: the file cannot be read or is not whole, or the runtime does not open such files.
        RuntimeMissing: a package that is needed, or the provider, is not installed.
        NoVerdict: the runtime cannot open it.
    """
    file = describe_candidate(path)
    if isinstance(file, CheckpointFile):
        raise InputError(f"{file.path}: expected an export, an .onnx or .xml file or its directory; found a checkpoint")
    interface, why_not = None, None
    try:
        interface = file.interface if isinstance(file, IrFile) else interface_of(file.inputs, file.outputs)
    except InputError as error:
        why_not = str(error)
    settings = None
    if runtime is not None:
        with Worker(_opened, file, runtime, provider_options or {}) as worker:  # which may crash
            settings = worker.call(copy.copy)
    query_heads = file.query_heads(interface.head_dim if interface else None)
    return Inspection(file, interface, why_not, query_heads, runtime, settings)


def _opened(file: OnnxFile | IrFile, runtime: str, provider_options: Mapping[str, str]) -> Settings:
    if runtime == "openvino":
        from verify.candidates.openvino_session import compiled_settings

        return compiled_settings(file.path, provider_options)
    if isinstance(file, IrFile) or not runtime.startswith("ort"):
        raise InputError(
            f"--runtime {runtime}: {file.path.name} was to be opened to see who runs what; openvino can do that, and "
            "ort-cpu and its like with .onnx files"
        )
    from verify.candidates.ort_session import open_session

    return open_session(file, runtime, provider_options)[1]


def inspect_weights(checkpoint: Checkpoint, candidate: str | Path) -> WeightsReport:
    """Finds each of a checkpoint's tensors in an export, by its numbers; no runtime is needed.

    Raises:
        InputError: a file cannot be read, is not whole, or its quantised weights do not fit together.
        RuntimeMissing: the `onnx` package is needed and not installed.
    """
    file = describe_candidate(candidate)
    tensors = tuple(matched.relation for matched in exported_checkpoint(checkpoint, file).matched)
    return WeightsReport(str(checkpoint.path), str(file.path), file.exporter, tensors)


def exported_checkpoint(checkpoint: Checkpoint, file: OnnxFile | IrFile | CheckpointFile) -> ExportedCheckpoint:
    """The checkpoint as an export holds it. Raises as `inspect_weights` does."""
    if isinstance(file, CheckpointFile):
        raise InputError(f"{file.path}: expected an export, an .onnx or .xml file or its directory; found a checkpoint")
    check_names_and_shapes(checkpoint)
    stored = ir_weights(file.path) if isinstance(file, IrFile) else onnx_weights(file.path)
    return ExportedCheckpoint(checkpoint, file.path, match(checkpoint, list(stored)))


def facts(inspection: Inspection) -> tuple[tuple[str, str], ...]:
    """What a reader is shown of an inspection: pairs of a heading and a text, in order."""
    file = inspection.file
    return (
        ("file", str(file.path)),
        ("sha256", file.sha256),
        ("exporter", file.exporter),
        ("opset", ", ".join(f"{domain} {version}" for domain, version in file.opsets.items())),
        ("IR version", str(file.ir_version)),
        *_decoder_facts(inspection),
        ("inputs", "\n".join(map(_declaration, file.inputs))),
        ("outputs", "\n".join(map(_declaration, file.outputs))),
        ("operators", ", ".join(f"{name} {count}" for name, count in file.operators.items())),
        (
            "weights",
            ", ".join(
                f"{dtype}: {total.tensors} tensors, {total.nbytes / 1e6:.1f} MB"
                for dtype, total in file.weights.items()
            ),
        ),
        *_runtime_facts(inspection),
    )


def _decoder_facts(inspection: Inspection) -> list[tuple[str, str]]:
    interface = inspection.interface
    if interface is None:
        return [("decoder", f"no: {inspection.why_not}")]
    open_ = "left open"
    return [
        ("cache", _cache(interface)),
        ("layers", str(len(interface.layers)) if interface.layers else "not shown"),
        ("query heads", str(inspection.query_heads or "not shown")),
        ("KV heads", str(interface.kv_heads or open_)),
        ("head size", str(interface.head_dim or open_)),
        ("vocabulary", str(interface.vocab_size or open_)),
    ]


def _cache(interface: Interface) -> str:
    if not interface.has_cache:
        return "none: it was exported without past_key_values"
    return f"yes, {interface.cache_dtype}{', which it keeps to itself (stateful)' if interface.is_stateful else ''}"


def _runtime_facts(inspection: Inspection) -> list[tuple[str, str]]:
    if inspection.settings is None:
        return []
    effective = dict(inspection.settings.effective)
    ran = [
        f"{provider} runs {said['nodes']} nodes"
        + (f": {', '.join(f'{name} {count}' for name, count in said['operators'].items())}" if said["nodes"] else "")
        for provider, said in effective.pop("providers").items()
    ]
    if "onnxruntime" in effective:
        version, properties = f"ONNX Runtime {effective['onnxruntime']}", []
    else:
        version = f"OpenVINO {effective.pop('openvino')}"
        properties = [("properties", "\n".join(f"{name} {value}" for name, value in effective.items()))]
    return [("runtime", f"{inspection.runtime}, {version}"), ("who runs what", "\n".join(ran)), *properties]


def _declaration(declared: Declared) -> str:
    shape = ", ".join("?" if size is None else str(size) for size in declared.shape)
    return f"{declared.name}: {declared.dtype} [{shape}]"
