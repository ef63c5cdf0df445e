"""Results with large arrays from one process to another: the arrays in a file that both map, the rest as a message."""

import mmap
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALIGNMENT = 64


@dataclass(frozen=True)
class Packed:
    """A value, but for the contents of its arrays, which are in `file` one after the other.

    Attributes:
        pickled: the rest.
        places: of each array, its first byte in the file and the one after its last.
    """

    pickled: bytes
    places: tuple[tuple[int, int], ...]
    file: Path


def pack(value: object, file: Path) -> Packed:
    """Writes the arrays in a value to a new file. Only contiguous ones are worth it; others are in the message.

    Source: PEP 574, pickle protocol 5 with out-of-band buffers.
    """
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    places = []
    with file.open("xb") as out:
        for buffer in buffers:
            out.seek(-out.tell() % ALIGNMENT, 1)
            start = out.tell()
            out.write(buffer.raw())
            places.append((start, out.tell()))
    return Packed(pickled, tuple(places), file)


def unpack(packed: Packed) -> Any:
    """The value again, and the file removed; its arrays are pages of the file and can be written to."""
    buffers: list[memoryview] = []
    if any(end > start for start, end in packed.places):
        with packed.file.open("rb") as stream:
            mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
        buffers = [mapped[start:end] for start, end in packed.places]
    else:  # nothing can be mapped of an empty file
        buffers = [memoryview(bytearray()) for _ in packed.places]
    packed.file.unlink(missing_ok=True)
    return pickle.loads(packed.pickled, buffers=buffers)
