"""Checkpoints as candidates, for runtimes that read them: a directory of safetensors, or a `.gguf` file."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from refengine.checkpoint import open_checkpoint, read_json
from refengine.gguf_file import GgufFile
from verify.files import sha256_of


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint, who says to have made it, and the files that decide what it computes."""

    path: Path
    exporter: str
    files: tuple[Path, ...]

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of all of them: that of the checkpoint compared with, where they are the same."""
        return sha256_of(*self.files)


def is_checkpoint(path: Path) -> bool:
    """Whether a path means a checkpoint: a `.gguf` file, or a directory with a configuration and safetensors."""
    return path.suffix == ".gguf" or ((path / "config.json").is_file() and any(path.glob("*.safetensors")))


def describe_checkpoint(path: Path) -> CheckpointFile:
    """Reads who made it.

    Raises:
        InputError: it is no whole checkpoint.
    """
    checkpoint = open_checkpoint(path)
    made_by = _of_gguf(path) if path.suffix == ".gguf" else _of_directory(path)
    return CheckpointFile(checkpoint.path, made_by, checkpoint.files)


def _of_directory(path: Path) -> str:
    version = read_json(path / "config.json").get("transformers_version")
    return f"checkpoint of transformers {version}" if version else "checkpoint"


def _of_gguf(path: Path) -> str:
    file = GgufFile.open(path)
    said = [file.value(f"general.{key}") for key in ("name", "quantized_by")]
    types = Counter(tensor.tensor_type.name for tensor in file.reader.tensors)
    stored = " ".join(name for name, _ in types.most_common())
    return ", ".join(["GGUF", *(str(text) for text in said if text), stored])
