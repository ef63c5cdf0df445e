"""The weights of the export that is compared: whether they are the checkpoint's, and what follows if not."""

from collections.abc import Mapping

from refengine.checkpoint import Checkpoint
from refengine.errors import InputError
from verify.candidates import Opened
from verify.candidates.checkpoint_file import CheckpointFile
from verify.candidates.onnx_file import OnnxFile
from verify.candidates.onnx_graph import ROUNDING_TOGETHER
from verify.candidates.openvino_file import IrFile
from verify.expect import AUTO, WEIGHTS, Expectation
from verify.inspection import exported_checkpoint
from verify.weights.exported import ExportedCheckpoint

UINT8 = (
    "the graph rounds inputs of some products to uint8 with one scale for all that is fed together "
    "(DynamicQuantizeLinear), and not of all: no --expect stands for that"
)
FIXED = (
    "the graph rounds values on the way with fixed scales (QuantizeLinear): what that costs depends on what the scales "
    "were measured on, and no --expect stands for that"
)
FIXED_BY = ("QuantizeLinear", "QLinearMatMul")
ASKS: Mapping[str, str] = {  # runtime -> what makes it round the inputs of products to int8
    "ort-cpu": "the graph's accuracy_level 4 of MatMulNBits asks for it",
    "openvino": "DYNAMIC_QUANTIZATION_GROUP_SIZE=0 turns it off",
}


def read_weights(
    checkpoint: Checkpoint, file: OnnxFile | IrFile | CheckpointFile
) -> tuple[ExportedCheckpoint | None, list[str]]:
    """The weights that an export holds, and notes on what there is to know of them.

    None where they cannot be read back, which is noted, and where the candidate is a checkpoint itself.
    """
    if isinstance(file, CheckpointFile):
        return None, []
    notes = notes_on_graph(file) if isinstance(file, OnnxFile) else []
    try:
        return exported_checkpoint(checkpoint, file), notes
    except InputError as error:
        return None, [
            *notes,
            f"the export's own weights cannot be read back, so nothing was held against them: {error}",
        ]


def are_expected(own: ExportedCheckpoint, expectation: Expectation) -> bool:
    """Whether weights are what is expected: the checkpoint's, and rounded no more coarsely than allowed."""
    return own.is_faithful and WEIGHTS.index(own.stored_as) <= WEIGHTS.index(expectation.coarsest_weights)


def notes_on_weights(own: ExportedCheckpoint, expectation: Expectation | None) -> list[str]:
    """Why an export's weights are not what was expected; None is what its own weights and settings say."""
    if not own.is_faithful:
        names = [tensor.name for tensor in own.report.unfaithful]
        others = f" and {len(names) - 1} other tensors are" if len(names) > 1 else " is"
        return [f"{names[0]}{others} not the checkpoint's; see python -m verify inspect MODEL CANDIDATE"]
    if expectation is not None and expectation.own_weights and not are_expected(own, expectation):
        return [f"its weights are {own.stored_as}, more coarsely rounded than {expectation.coarsest_weights}"]
    return []


def notes_on_int8(candidate: Opened, expectation: Expectation | None) -> list[str]:
    """That a runtime multiplies quantised weights with inputs that it rounds to 8 bits, where that is not expected."""
    said = candidate.expectation.arithmetic
    if expectation is None:
        return []
    if said.together and not expectation.arithmetic.together:
        how = "uint8 with one scale for all that is fed together (the graph's DynamicQuantizeLinear asks for it)"
    elif said.block is not None and said.block != expectation.arithmetic.block:
        asks = ASKS.get(candidate.runtime, "its kernels for quantised weights do so")
        how = f"int8 in blocks of {said.block} ({asks})"
    else:
        return []
    return [
        f"{candidate.runtime}: inputs of products are rounded to {how}; --expect {AUTO} takes that for its arithmetic"
    ]


def notes_on_graph(file: OnnxFile) -> list[str]:
    """What a graph rounds besides its weights that no reference rounds."""
    names = {name.rpartition(".")[2] for name in file.operators}
    some = bool(names & set(ROUNDING_TOGETHER)) and not file.rounds_together
    return [UINT8] * some + [FIXED] * bool(names & set(FIXED_BY))
