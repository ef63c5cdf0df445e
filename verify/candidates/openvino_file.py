"""OpenVINO's IR, an `.xml` with a `.bin` beside it, read without running it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

from refengine.errors import InputError
from verify.files import sha256_of

USUAL_NAME = "openvino_model.xml"


@dataclass(frozen=True)
class IrFile:
    """An IR, and who says to have made it."""

    path: Path
    exporter: str

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of both files."""
        return sha256_of(self.path, self.path.with_suffix(".bin"))


def find_ir(path: str | Path) -> Path | None:
    """The `.xml` that a path means: itself, or that of an exporter's directory; None where it means something else."""
    path = Path(path)
    if path.is_dir():
        return path / USUAL_NAME if (path / USUAL_NAME).is_file() else None
    return path if path.suffix == ".xml" else None


def describe_ir(path: Path) -> IrFile:
    """Reads who made it.

    Raises:
        InputError: a file is missing or cannot be read, or it is no IR.
    """
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        if not file.is_file():
            raise InputError(f"{file}: no such file; expected OpenVINO's IR, an .xml and a .bin of one name")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole IR ({error}); export or copy it again") from error
    if root.tag != "net":
        raise InputError(f"{path}: expected OpenVINO's IR, found XML of <{root.tag}>")
    versions = {
        f"{tool} {node.get('value')}"
        for tool, place in (("optimum-intel", "optimum/optimum_intel_version"), ("OpenVINO", "Runtime_version"))
        if (node := root.find(f"rt_info/{place}")) is not None
    }
    return IrFile(path, ", ".join(sorted(versions, reverse=True)) or "unknown")
