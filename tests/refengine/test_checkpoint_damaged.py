"""Safetensors files that are damaged or lie end in one line that names the file."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.checkpoint import open_checkpoint
from refengine.errors import CheckpointError
from refengine.weights import Weights
from tests.checkpoints import write_checkpoint
from tests.refengine.checkpoint_files import FILE, NORM, header_of, refused, write_header


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -4000])
def test_a_truncated_file_is_refused(kept: int, directory: Path) -> None:
    content = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(content[:kept])
    assert FILE in refused(directory)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(length: int, directory: Path) -> None:
    content = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(struct.pack("<Q", length) + content[8:])
    assert FILE in refused(directory)


@pytest.mark.parametrize(
    "lie",
    [
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [2**40, 2**40 + 160]},
        {"data_offsets": [160, 0]},
        {"data_offsets": [-160, 0]},
        {"data_offsets": [0, 8]},
        {"data_offsets": [0]},
        {"shape": [41]},
        {"shape": [2**62, 2**62]},
        {"shape": [-40]},
        {"shape": "40"},
        {"dtype": "F64"},
        {"dtype": "F128"},
    ],
    ids=str,
)
def test_a_header_entry_that_lies_is_refused(lie: dict[str, Any], directory: Path) -> None:
    header, rest = header_of(directory / FILE)
    write_header(directory / FILE, header | {NORM: header[NORM] | lie}, rest)
    assert FILE in refused(directory)


def test_tensors_that_share_bytes_are_refused(directory: Path) -> None:
    header, rest = header_of(directory / FILE)
    other = "model.layers.0.input_layernorm.weight"
    write_header(directory / FILE, header | {NORM: header[other]}, rest)
    assert FILE in refused(directory)


@settings(max_examples=100)
@given(
    place=st.integers(0, 3000),
    new=st.binary(min_size=1, max_size=8),
)
def test_any_damage_to_a_header_is_read_as_it_stands_or_refused_in_one_line(
    place: int, new: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = write_checkpoint(tmp_path_factory.mktemp("model"))
    content = bytearray((directory / FILE).read_bytes())
    content[place : place + len(new)] = new
    (directory / FILE).write_bytes(content)
    said = ""
    try:
        Weights.open(open_checkpoint(directory))
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
