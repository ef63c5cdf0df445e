"""A checkpoint written as a plain ONNX decoder, with the `onnx` package alone."""

from pathlib import Path

from refengine.checkpoint import Checkpoint
from refengine.errors import MissingPackage


def export_decoder(checkpoint: Checkpoint, out: Path, *, cache: bool = True) -> None:
    """Writes the checkpoint as a float32 ONNX decoder: plain operators, and optimum's inputs and outputs.

    Nodes are called after the checkpoint's modules and the trace points of the reference
    (`/model/layers.3/self_attn/q_rope/Add`), weights by their checkpoint names; a name that ends in `.T`
    holds that tensor transposed. A model too large for one protobuf message keeps its weights in `OUT_data`,
    beside `OUT`. Files appear whole or not at all.

    Args:
        checkpoint: what to export; read one tensor at a time.
        out: the `.onnx` file to write, in a directory that exists; a file of this name is replaced.
        cache: take `past_key_values.N.key` and `.value`, and give `present.N.key` and `.value`.

    Raises:
        CheckpointError: a tensor is missing, misshapen, or not finite in float32.
        MissingPackage: the `onnx` package is not installed.
        InputError: `out` cannot be written, or the rotary frequencies depend on the length of the sequence.
    """
    try:
        import onnx  # noqa: F401 -- an extra: absent from an installation that never exports
    except ModuleNotFoundError as error:
        raise MissingPackage(f"{out}: an export needs the onnx package; install the export extra") from error
    from verify.export.decoder import decoder_graph
    from verify.export.files import weight_reader, write_model

    graph = decoder_graph(checkpoint.config, cache=cache)
    write_model(graph, weight_reader(checkpoint), Path(out))
