"""What an export is, for `python -m verify inspect`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refengine.errors import InputError
from verify.candidates import Settings
from verify.candidates.onnx_file import OnnxFile, describe
from verify.interface import Interface, interface_of


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

    file: OnnxFile
    interface: Interface | None
    why_not: str | None
    query_heads: int | None
    runtime: str | None
    settings: Settings | None


def inspect(
    path: str | Path, runtime: str | None = None, provider_options: Mapping[str, str] | None = None
) -> Inspection:
    """Reads an ONNX export without its checkpoint; with a runtime, opens it there to see who runs what.

    Raises:
        InputError: the file cannot be read or is not whole.
        RuntimeMissing: a package that is needed, or the provider, is not installed.
        NoVerdict: the runtime cannot open it.
    """
    file = describe(path)
    interface, why_not = None, None
    try:
        interface = interface_of(file.inputs, file.outputs)
    except InputError as error:
        why_not = str(error)
    settings = None
    if runtime is not None:
        from verify.candidates.ort import open_session

        _, settings = open_session(file, runtime, provider_options or {})
    query_heads = file.query_heads(interface.head_dim if interface else None)
    return Inspection(file, interface, why_not, query_heads, runtime, settings)
