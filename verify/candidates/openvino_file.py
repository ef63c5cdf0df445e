"""OpenVINO's IR, an `.xml` with a `.bin` beside it, read without running it: what it declares and what it holds.

Source: openvino 2026.4, the IR's version 11.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from xml.etree import ElementTree

from refengine.errors import InputError
from verify.candidates.onnx_graph import WeightTotal
from verify.candidates.openvino_weights import CODES, FLOATS, UNREAD
from verify.files import sha256_of
from verify.interface import CACHE_NAME, Declared, Interface, interface_of

USUAL_NAME = "openvino_model.xml"
NO_OPERATORS = ("Const", "Parameter", "Result")
STATE = re.compile(r"(past_key_values\.\d+\.(?:key|value))(present\.\d+\.(?:key|value))")  # optimum-intel's names
WHOLE_NUMBERS = re.compile(r"([iu])(8|16|32|64)")
OPSET = re.compile(r"opset(\d+)")
ATTENTION = "ScaledDotProductAttention"


@dataclass(frozen=True)
class IrFile:
    """What an IR says of itself.

    Attributes:
        path: the `.xml`.
        exporter: who says to have made it, with versions.
        ir_version: of the format.
        opsets: the newest of OpenVINO's that an operator is from.
        inputs: what has to be fed.
        outputs: what it gives.
        states: what it keeps to itself from one step to the next: names of the past and the present it stands for.
        operators: number of layers by type, the most frequent first, those left out that compute nothing.
        weights: by dtype, the largest first; single numbers and sizes are left out.
        declared_heads: num_attention_heads, where attention operators show it.
    """

    path: Path
    exporter: str
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]
    states: tuple[tuple[Declared, Declared], ...]
    operators: Mapping[str, int]
    weights: Mapping[str, WeightTotal]
    declared_heads: int | None

    @property
    def interface(self) -> Interface:
        """What is fed and given, what it keeps to itself among it. Raises InputError when it is no decoder."""
        past, present = ([state[side] for state in self.states] for side in (0, 1))
        return interface_of((*self.inputs, *past), (*self.outputs, *present), is_stateful=bool(self.states))

    def query_heads(self, head_dim: int | None) -> int | None:
        """num_attention_heads, where an attention operator shows it."""
        return self.declared_heads

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
    """Reads the graph, and checks that its weights are there and whole.

    Raises:
        InputError: a file is missing, cut short or cannot be read, or it is no IR.
    """
    weights = path.with_suffix(".bin")
    for part in (path, weights):
        if not part.is_file():
            raise InputError(f"{part}: no such file; expected OpenVINO's IR, an .xml and a .bin of one name")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole IR ({error}); export or copy it again") from error
    if root.tag != "net":
        raise InputError(f"{path}: expected OpenVINO's IR, found XML of <{root.tag}>")
    try:
        file = _file(path, root)
        needed = max((int(data["offset"]) + int(data["size"]) for data in _constants(root)), default=0)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a whole IR ({error!r}); export or copy it again") from error
    found = weights.stat().st_size
    if found < needed:
        raise InputError(
            f"{weights}: expected the {needed} bytes that {path.name} refers to, found {found}: cut short, or of "
            "another export; copy both again"
        )
    return file


def _file(path: Path, root: ElementTree.Element) -> IrFile:
    layers = list(root.iterfind("layers/layer"))
    opsets = [int(known[1]) for layer in layers if (known := OPSET.fullmatch(layer.get("version", "")))]
    types = Counter(layer.attrib["type"] for layer in layers)
    return IrFile(
        path,
        _exporter(root),
        int(root.attrib["version"]),
        {"openvino": max(opsets, default=0)},
        tuple(_input(layer) for layer in layers if layer.attrib["type"] == "Parameter"),
        tuple(_outputs(root, layers)),
        tuple(_states(layers)),
        {name: count for name, count in types.most_common() if name not in NO_OPERATORS},
        _weight_totals(root),
        _heads(layers),
    )


def _exporter(root: ElementTree.Element) -> str:
    versions = {
        f"{tool} {node.get('value')}"
        for tool, place in (("optimum-intel", "optimum/optimum_intel_version"), ("OpenVINO", "Runtime_version"))
        if (node := root.find(f"rt_info/{place}")) is not None
    }
    return ", ".join(sorted(versions, reverse=True)) or "unknown"


def _constants(root: ElementTree.Element) -> Iterator[Mapping[str, str]]:
    """What each constant says of its place in the `.bin`."""
    for layer in root.iterfind("layers/layer"):
        if layer.attrib["type"] == "Const" and (data := layer.find("data")) is not None:
            yield data.attrib


def _input(layer: ElementTree.Element) -> Declared:
    (port,) = layer.iterfind("output/port")
    return Declared(_name(port.get("names"), layer.attrib["name"]), _dtype(port.attrib["precision"]), _shape(port))


def _outputs(root: ElementTree.Element, layers: list[ElementTree.Element]) -> Iterator[Declared]:
    """Results by the name of what they are fed, which has it from the model before it was converted."""
    names = {
        (layer.attrib["id"], port.attrib["id"]): port.get("names")
        for layer in layers
        for port in layer.iterfind("output/port")
    }
    fed = {
        edge.attrib["to-layer"]: names.get((edge.attrib["from-layer"], edge.attrib["from-port"]))
        for edge in root.iterfind("edges/edge")
    }
    for layer in layers:
        if layer.attrib["type"] == "Result":
            (port,) = layer.iterfind("input/port")
            name = _name(layer.get("output_names") or fed.get(layer.attrib["id"]), layer.attrib["name"])
            yield Declared(name, _dtype(port.attrib["precision"]), _shape(port))


def _states(layers: list[ElementTree.Element]) -> Iterator[tuple[Declared, Declared]]:
    for layer in layers:
        data = layer.find("data")
        if layer.attrib["type"] != "ReadValue" or data is None:
            continue
        if (known := STATE.fullmatch(data.attrib["variable_id"])) is not None:
            sizes = data.attrib["variable_shape"].split(",")
            shape = tuple(int(size) if size.isdecimal() else None for size in sizes)
            dtype = _dtype(data.attrib["variable_type"])
            yield Declared(known[1], dtype, shape), Declared(known[2], dtype, shape)


def _heads(layers: list[ElementTree.Element]) -> int | None:
    """num_attention_heads, as the queries of every attention operator have it; None where they do not show it."""
    ports = [layer.find("input/port") for layer in layers if layer.attrib["type"] == ATTENTION]
    heads = {shape[1] for port in ports if port is not None and len(shape := _shape(port)) == 4}
    return heads.pop() if len(heads) == 1 else None


def _weight_totals(root: ElementTree.Element) -> dict[str, WeightTotal]:
    sizes: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for data in _constants(root):
        elements = prod(int(size) for size in data["shape"].split(",") if size.strip())
        if elements > 1 and data["element_type"] in (*FLOATS, *CODES, *UNREAD):
            sizes[_dtype(data["element_type"])].append((elements, int(data["size"])))
    totals = {
        dtype: WeightTotal(len(of), sum(elements for elements, _ in of), sum(nbytes for _, nbytes in of))
        for dtype, of in sizes.items()
    }
    return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))


def _name(names: str | None, otherwise: str) -> str:
    """The name that says what it is, of several."""
    given = (names or otherwise).split(",")
    return next((name for name in given if name == "logits" or CACHE_NAME.fullmatch(name)), given[0])


def _dtype(precision: str) -> str:
    """NumPy's name of an element type, which layers write as f32 and ports as FP32; as it stands where it has none."""
    name = precision.lower().replace("fp", "f")
    if (whole := WHOLE_NUMBERS.fullmatch(name)) is not None:
        return f"{'u' if whole[1] == 'u' else ''}int{whole[2]}"
    named = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "u4": "uint4", "i4": "int4"}
    return named.get(name, name)


def _shape(port: ElementTree.Element) -> tuple[int | None, ...]:
    sizes = [int(axis.text or "") for axis in port.iterfind("dim")]
    return tuple(None if size < 0 else size for size in sizes)
