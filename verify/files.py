"""Files written whole or not at all, and their fingerprints."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refengine.errors import InputError


def check_place(path: Path) -> None:
    """Raises InputError when no file can be put at `path`: its directory does not exist, or it is a directory."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such directory {path.parent} to write to; create it first")
    if path.is_dir():
        raise InputError(f"{path}: is a directory; expected the name of a file to write")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes `path`'s place when the block ends well, and is removed otherwise.

    What a link stands for is replaced, not the link; a device or a pipe is written to as it is.

    Raises:
        InputError: no file can be put there.
    """
    check_place(path)
    if path.exists() and not path.is_file():
        try:
            yield path
        except OSError as error:
            raise InputError(f"{path}: could not be written ({error.strerror})") from error
        return
    given, path = path, path.resolve()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{given}: could not be written ({error.strerror})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def sha256_of(*paths: Path) -> str:
    """One hexadecimal fingerprint of some files' contents, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
    return digest.hexdigest()
