"""Checkpoints on disk: a directory of safetensors with its config.json, or a GGUF file; memory-mapped, read by name."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 -- registers bfloat16 with NumPy, which safetensors needs to name it
import numpy as np
from safetensors import SafetensorError, safe_open

from refengine.config import Config, end_tokens
from refengine.errors import CheckpointError, ConfigError
from refengine.hub import local_path

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint(Protocol):
    """Tensors by their checkpoint names, and the configuration that says what they mean."""

    path: Path
    config: Config
    names: frozenset[str]
    files: tuple[Path, ...]  # everything that decides what the model computes

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor, in the float dtype it is stored in (dequantised to float32 where it is not a float)."""

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of the tensor's first axis, reading no others."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory (config.json, *.safetensors), a `.gguf` file, or a model of the hub by its name.

    Raises:
        CheckpointError: there is no readable, safe checkpoint at `path`.
        ConfigError: its configuration is incomplete or not supported.
    """
    path = local_path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory; expected a checkpoint directory or a .gguf file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: expected a checkpoint directory or a .gguf file, found another file")
        from refengine.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    return SafetensorsCheckpoint(path)


class SafetensorsCheckpoint:
    """A Hugging Face checkpoint directory: one safetensors file, or shards with an index.

    Files stay mapped while this object lives; reading a tensor copies that tensor and nothing else.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _config_of(path)
        self._open_files = ExitStack()
        shards = _shards(path)
        tensors = sorted(set(shards.values()) if isinstance(shards, Mapping) else shards)
        self.files = (path / "config.json", *tensors)
        self._file_of = self._tensors_by_name(shards, tensors)
        self.names = frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor in its stored dtype. Raises CheckpointError for a dtype that is no float."""
        return self._slice(name)[:]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of the first axis, in the stored dtype."""
        return self._slice(name)[start:stop]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.path}: no tensor {name!r}; the checkpoint is incomplete or of another model")
        found = self._file_of[name].get_slice(name)
        if found.get_dtype() not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.path}: {name}: expected a dtype of {', '.join(FLOAT_DTYPES)}, found {found.get_dtype()}"
            )
        return found

    def _tensors_by_name(self, shards: Mapping[str, Path] | list[Path], tensors: list[Path]) -> dict[str, Any]:
        """Tensor name -> the open file that holds it: the one that the index says, where there is an index."""
        opened = {file: self._open(file) for file in tensors}
        names = {file: set(handle.keys()) for file, handle in opened.items()}
        if not isinstance(shards, Mapping):
            return {name: opened[file] for file in tensors for name in names[file]}
        for name, file in shards.items():
            if name not in names[file]:
                raise CheckpointError(f"{file}: no tensor {name!r}, although {INDEX} says that it is here")
        return {name: opened[file] for name, file in shards.items()}

    def _open(self, file: Path) -> Any:
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file; the checkpoint is incomplete (copy or download this shard again)"
            )
        try:
            return self._open_files.enter_context(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a whole safetensors file ({error}); copy or download it again"
            ) from error


def _shards(path: Path) -> Mapping[str, Path] | list[Path]:
    """The safetensors files of a directory: tensor name -> file where there is an index, else the one file."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX}: expected a 'weight_map' of tensor names to files, found none")
        return {name: _inside(path, file) for name, file in weight_map.items()}
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(
            f"{path}: expected {INDEX} beside {len(others)} safetensors files, found none; copy it from the "
            "model's source"
        )
    for pattern in PICKLES:
        if pickled := sorted(path.glob(pattern)):
            raise CheckpointError(
                f"{pickled[0]}: pickled weights are never loaded, since a pickle can run code; convert them to "
                "safetensors"
            )
    raise CheckpointError(f"{path}: no model.safetensors and no {INDEX}; expected a Hugging Face checkpoint directory")


def _inside(directory: Path, file: Any) -> Path:
    """A file named by an index, which may not leave the index's directory."""
    # Compared as written, not resolved: model caches keep their files as links to a store elsewhere.
    if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
        raise CheckpointError(
            f"{directory / INDEX}: names the file {file!r}, which leaves the checkpoint's directory; "
            "expected a plain file name"
        )
    return directory / file


def _config_of(path: Path) -> Config:
    """config.json; end tokens come from generation_config.json where it has them, as in transformers' generate."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json; expected a Hugging Face checkpoint directory")
    try:
        config = Config.from_dict(read_json(file))
        file = path / "generation_config.json"
        ends = end_tokens(read_json(file).get("eos_token_id")) if file.is_file() else ()
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return replace(config, eos_token_id=ends or config.eos_token_id)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when the file is not one."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed
