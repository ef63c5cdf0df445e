"""The file that a user's CANDIDATE means, whoever is to run it."""

from pathlib import Path

from verify.candidates.checkpoint_file import CheckpointFile, describe_checkpoint, is_checkpoint
from verify.candidates.onnx_file import FOLDERS, OnnxFile, describe
from verify.candidates.openvino_file import IrFile, describe_ir, find_ir

OF_CHECKPOINTS = ("transformers", "llama.cpp")  # runtimes that read no exports


def describe_candidate(path: str | Path, runtime: str | None = None) -> OnnxFile | IrFile | CheckpointFile:
    """What an `.xml`, `.onnx` or `.gguf` file is, or the one in an exporter's directory, or a checkpoint's directory.

    Args:
        runtime: who is to run it, where a directory may hold both a checkpoint and its export.

    Raises:
        InputError: there is none, or it is not whole.
        RuntimeMissing: the package that reads it is not installed.
    """
    path = Path(path)
    if runtime in OF_CHECKPOINTS:
        return describe_checkpoint(path)
    if (ir := find_ir(path)) is not None:
        return describe_ir(ir)
    exported = any(file for folder in FOLDERS for file in (path / folder).glob("*.onnx"))
    return describe_checkpoint(path) if is_checkpoint(path) and not exported else describe(path)
