"""An `.onnx` file read without running it: what it declares and what it holds."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refengine.errors import InputError
from verify.candidates.onnx_checks import check_names, check_types, external_files, leaves_directory
from verify.candidates.onnx_graph import (
    WeightTotal,
    attention_width,
    constants,
    declared,
    declared_heads,
    every_node,
    every_tensor,
    int8_block,
    product_dtype,
    rounds_together,
    stored_dtype,
    weight_totals,
)
from verify.errors import RuntimeMissing
from verify.files import sha256_of
from verify.interface import Declared

if TYPE_CHECKING:
    import onnx

CANDIDATES = "an .onnx file, OpenVINO's .xml, or a directory that holds one"
FOLDERS = ("", "onnx/")  # the second is where onnx-community keeps every precision of a model
USUAL_PLACES = tuple(
    f"{folder}{name}.onnx" for name in ("model", "decoder_model_merged", "decoder_model") for folder in FOLDERS
)
# Of one decoder in two files, the one that reads prompts and the one that goes on from their past; what comes after
# is the precision.
HALVES = re.compile(r"decoder_(with_past_)?model(?!_merged)(.*\.onnx)")
GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class OnnxFile:
    """What an `.onnx` file says of itself.

    Attributes:
        path: the file.
        exporter: the producer's name and version, as the file has them.
        ir_version: of the ONNX format.
        opsets: version by domain; ONNX's own domain is "ai.onnx".
        inputs: what has to be fed.
        outputs: what it gives.
        operators: number of nodes by operator, in the graph, its branches and its functions, the most
            frequent first; operators of other domains than ONNX's own are "domain.name".
        weights: by dtype, the largest first.
        external_files: the files beside it that hold weights.
        declared_heads: num_attention_heads, where an attention operator says it.
        attention_width: num_attention_heads * head_dim, where the shape of `o_proj` shows it.
        product_dtype: the float dtype that linear maps compute in, where it is one.
        int8_block: how many inputs of a product share a scale, where the graph asks for inputs rounded to int8.
        rounds_together: products take inputs that were rounded to uint8, with one scale for all that is fed together.
        with_past: the file beside it that goes on from its present, where an older exporter made two.
    """

    path: Path
    exporter: str
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]
    operators: Mapping[str, int]
    weights: Mapping[str, WeightTotal]
    external_files: tuple[Path, ...]
    declared_heads: int | None
    attention_width: int | None
    product_dtype: str | None
    int8_block: int | None
    rounds_together: bool
    with_past: "OnnxFile | None" = None

    def query_heads(self, head_dim: int | None) -> int | None:
        """num_attention_heads, as far as the graph shows it to one who knows the head size."""
        if self.declared_heads is not None or not self.attention_width or not head_dim:
            return self.declared_heads
        heads, rest = divmod(self.attention_width, head_dim)
        return None if rest else heads

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the `.onnx` file, its external files in the order of their names, and those of `with_past`."""
        halves = [self] if self.with_past is None else [self, self.with_past]
        return sha256_of(*(file for half in halves for file in (half.path, *half.external_files)))


def find_onnx(path: str | Path) -> Path:
    """The `.onnx` file that a file or an exporter's directory means; of a decoder in two, the one that reads prompts.

    Raises:
        InputError: there is none, or more than one.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory; expected {CANDIDATES}")
    if path.is_file():
        if path.suffix != ".onnx":
            is_ir = path.suffix == ".xml"
            expected = "an .onnx file, as an OpenVINO IR is run by --runtime openvino" if is_ir else CANDIDATES
            raise InputError(f"{path}: expected {expected}; found one called {path.name}")
        return _first_half(path)
    places = [path / place for place in (*_decoder_of_genai_config(path), *USUAL_PLACES)]
    usual = next((place for place in places if place.is_file()), None)
    return usual or _only_one(path)


def _only_one(directory: Path) -> Path:
    """The model in a directory that has none of the usual names."""
    found = {_first_half(file) for folder in FOLDERS for file in (directory / folder).glob("*.onnx")}
    if len(found) > 1:
        names = ", ".join(sorted(file.relative_to(directory).as_posix() for file in found))
        raise InputError(f"{directory}: found {names} and no model.onnx; give the path of one of them")
    if not found:
        raise InputError(
            f"{directory}: no model.onnx, no onnx/model.onnx, no openvino_model.xml and no {GENAI_CONFIG}; "
            "expected the directory of an export, or the path of a file in it"
        )
    return found.pop()


def _first_half(path: Path) -> Path:
    """The file that reads prompts where this one goes on from them, and otherwise this one."""
    half = HALVES.fullmatch(path.name)
    if half is None or not half[1]:
        return path
    first = path.with_name(f"decoder_model{half[2]}")
    if not first.is_file():
        raise InputError(
            f"{first}: no such file, although {path.name} beside it only goes on from the past that it gives; "
            "copy it from where the export was made"
        )
    return first


def _second_half(path: Path) -> Path | None:
    """The file beside this one that goes on from the past that this one gives, where there is one."""
    half = HALVES.fullmatch(path.name)
    second = path.with_name(f"decoder_with_past_model{half[2]}") if half else path
    return second if second != path and second.is_file() else None


def describe(path: str | Path) -> OnnxFile:
    """Reads the graph and checks that the files with its weights are there, whole, and in its own directory.

    Args:
        path: an `.onnx` file, or a directory that holds one.

    Raises:
        InputError: it is not a whole ONNX file, or its external data are missing, cut short or elsewhere.
        RuntimeMissing: the `onnx` package is not installed.
    """
    path = find_onnx(path)
    second = _second_half(path)
    file = _described(path)
    return file if second is None else replace(file, with_past=_described(second))


def _described(path: Path) -> OnnxFile:
    onnx = _import_onnx()
    model = parsed(path)
    tensors, nodes = list(every_tensor(model)), list(every_node(model))
    check_names(path, model, nodes, tensors)
    check_types(onnx, path, model, tensors)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in tensors}
    operators = Counter(f"{node.domain}.{node.op_type}".removeprefix("ai.onnx").lstrip(".") for node in nodes)
    return OnnxFile(
        path=path,
        exporter=f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        ir_version=model.ir_version,
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        inputs=tuple(declared(onnx, info) for info in model.graph.input if info.name not in shapes),
        outputs=tuple(declared(onnx, info) for info in model.graph.output),
        operators=dict(operators.most_common()),
        weights=weight_totals(onnx, tensors),
        external_files=external_files(onnx, path, tensors),
        declared_heads=declared_heads(nodes),
        attention_width=attention_width(nodes, shapes),
        product_dtype=product_dtype(nodes, {tensor.name: stored_dtype(onnx, tensor.data_type) for tensor in tensors}),
        int8_block=int8_block(nodes),
        rounds_together=rounds_together(nodes, constants(model)),
    )


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise RuntimeMissing(
            f"ONNX exports are read with onnx, which cannot be imported ({error}): "
            'pip install "tokenproof[onnxruntime]"'
        ) from error
    return onnx


def _decoder_of_genai_config(directory: Path) -> list[str]:
    """The file name in onnxruntime-genai's `genai_config.json`, where there is one."""
    file = directory / GENAI_CONFIG
    if not file.is_file():
        return []
    try:
        filename = json.loads(file.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected model.decoder.filename, found none ({error!r})") from error
    if not isinstance(filename, str) or leaves_directory(filename):
        raise InputError(
            f"{file}: model.decoder.filename is {filename!r}, which leaves the model's "
            "directory; expected a plain file name"
        )
    if not (directory / filename).is_file():
        raise InputError(f"{directory / filename}: no such file, although {file.name} names it; copy it there")
    return [filename]


def parsed(path: Path) -> "onnx.ModelProto":
    """The message in an `.onnx` file, without its external data. Raises InputError when it is no whole model."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path}: not a whole ONNX file ({error}); export or copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not model.graph.node or not model.opset_import:
        raise InputError(f"{path}: expected an ONNX model, found no graph in it; export or copy it again")
    return model
