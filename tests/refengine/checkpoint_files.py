"""Checkpoint directories changed on disk: other tensors, shards and an index, another header."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refengine.checkpoint import INDEX, open_checkpoint
from refengine.errors import CheckpointError, InputError
from refengine.weights import Weights

FILE = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"


def refused(path: Path, kind: type[InputError] = CheckpointError) -> str:
    """The one line that opening the checkpoint, or its weights, ends with."""
    with pytest.raises(kind) as error:
        Weights.open(open_checkpoint(path))
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def changed(directory: Path, **tensors: np.ndarray | None) -> None:
    """Writes the weights again with these tensors (None: without)."""
    kept = load_file(directory / FILE) | tensors
    save_file({name: array for name, array in kept.items() if array is not None}, directory / FILE)


def sharded(directory: Path, shards: int = 3) -> dict[str, str]:
    """Splits the weights into shards with an index; returns its weight map."""
    tensors = load_file(directory / FILE)
    (directory / FILE).unlink()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({name: tensors[name] for name, of in weight_map.items() if of == shard}, directory / shard)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file, and the bytes behind it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, header: dict[str, Any], rest: bytes) -> None:
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + rest)
