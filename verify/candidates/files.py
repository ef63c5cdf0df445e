"""The file that a user's CANDIDATE means, whoever is to run it."""

from pathlib import Path

from verify.candidates.onnx_file import OnnxFile, describe
from verify.candidates.openvino_file import IrFile, describe_ir, find_ir


def describe_candidate(path: str | Path) -> OnnxFile | IrFile:
    """What an `.xml` or `.onnx` file is, or the one in an exporter's directory.

    Raises:
        InputError: there is none, or it is not whole.
        RuntimeMissing: the package that reads it is not installed.
    """
    ir = find_ir(path)
    return describe(path) if ir is None else describe_ir(ir)
