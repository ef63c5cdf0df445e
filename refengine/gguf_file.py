"""A GGUF file on disk: its metadata by key, and its tensors as they are stored, mapped and not read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refengine.errors import CheckpointError, MissingPackage

if TYPE_CHECKING:
    from gguf.gguf_reader import GGUFReader, ReaderField


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file. `reader.tensors` are views of the mapped file."""

    path: Path
    reader: "GGUFReader"

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Map the file and read its header.

        Raises:
            CheckpointError: it is no GGUF file, or not a whole one.
            MissingPackage: the `gguf` package is not installed.
        """
        reader_class = _reader_class(path)
        try:
            reader = reader_class(path)
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole GGUF file ({_line(error)}); copy or download it again"
            ) from error
        if reader.byte_order == "S":
            raise CheckpointError(f"{path}: expected a GGUF file in this machine's byte order, found the other one")
        return cls(path, reader)

    def value(self, key: str) -> Any:
        """The metadata value under `key`, or None where the file has none.

        A float32 is given as the shortest decimal that means it, which is the number that its writer had:
        1e-05, not 9.999999747378752e-06.
        """
        field = self.reader.fields.get(key)
        try:
            return None if field is None else _contents(field)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: {key}: not readable ({_line(error)}); copy or download it again"
            ) from error

    def section(self, prefix: str) -> dict[str, Any]:
        """Every metadata value whose key starts with `prefix`, under the rest of its key."""
        return {key.removeprefix(prefix): self.value(key) for key in self.reader.fields if key.startswith(prefix)}


def _reader_class(path: Path) -> "type[GGUFReader]":
    """`gguf.GGUFReader` that stops at the end of the file and reads a list in one step.

    As it comes, the reader takes what lies past the end for empty, and six seconds for 49 thousand tokens.
    """
    try:
        from gguf.constants import GGUFValueType
        from gguf.gguf_reader import GGUFReader
    except ImportError as error:
        raise MissingPackage(f"{path}: reading a GGUF file needs the gguf package; install the gguf extra") from error

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > self.data.size:
                raise ValueError(f"it has {self.data.size} bytes, its header speaks of byte {end}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            element_type, count, start = (
                self._get(orig_offs, np.uint32),
                self._get(orig_offs + 4, np.uint64),
                orig_offs + 12,
            )
            kind = GGUFValueType(int(element_type[0]))
            if kind == GGUFValueType.STRING:
                strings = self._strings(start, int(count[0]))
                size = sum(8 + string.nbytes for string in strings)
            elif kind in self.gguf_scalar_to_np:
                strings = [self._get(start, self.gguf_scalar_to_np[kind], int(count[0]))]
                size = strings[0].nbytes
            else:
                raise ValueError(f"a list of {kind.name.lower()}s")
            parts = [element_type, count, *strings]
            return 12 + size, parts, list(range(2, len(parts))), [GGUFValueType.ARRAY, kind]

        def _strings(self, offset: int, count: int) -> list[np.ndarray]:
            plain, found = np.asarray(self.data), []
            self._get(
                offset, np.uint64, count
            )  # each has a length at least: a count past the end of the file stops here
            for _ in range(count):
                length = int.from_bytes(
                    plain[offset : offset + 8].tobytes(), "little" if self.byte_order == "I" else "big"
                )
                self._get(offset + 8, np.uint8, length)
                found.append(plain[offset + 8 : offset + 8 + length])
                offset += 8 + length
            return found

    return Reader


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _contents(field: "ReaderField") -> Any:
    value = field.contents()
    if isinstance(value, float) and field.parts[-1].dtype == np.float32:
        return float(str(np.float32(value)))
    return value
