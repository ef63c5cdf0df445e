"""A GGUF file of a Llama as a checkpoint: Hugging Face names and row order, dequantised row by row."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from refengine.errors import CheckpointError
from refengine.gguf_config import ROPE_DIVISORS, config_of, llama_metadata
from refengine.gguf_file import GgufFile

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

TOP_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NORM_NAMES: Mapping[str, str] = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LINEAR_NAMES: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufCheckpoint:
    """A `.gguf` file of architecture llama, with the names and the row order of a Hugging Face checkpoint.

    Float tensors keep their dtype and are views of the mapped file; quantised ones become float32, and no
    more of them than is asked for. Nothing in the file speaks of a sliding window, so a Mistral in GGUF is
    the full-attention Llama that llama.cpp runs.

    Raises:
        CheckpointError: no readable GGUF file, or one of another architecture, incomplete, or in a
            quantisation that the `gguf` package cannot read.
        ConfigError: the metadata ask for mathematics that is not supported.
        MissingPackage: the `gguf` package is not installed.

    Source: ggml, docs/gguf.md; llama.cpp, src/models/llama.cpp and its conversion of LlamaForCausalLM.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files: tuple[Path, ...] = (path,)
        file = GgufFile.open(path)
        llama = llama_metadata(file)
        stored = {tensor.name: tensor for tensor in file.reader.tensors}
        divisors = stored.pop(ROPE_DIVISORS, None)
        self._stored = {_checkpoint_name(path, name): tensor for name, tensor in stored.items()}
        self._refuse_unreadable_types()
        self.names = frozenset(self._stored)
        self.config = config_of(file, llama, self._of_tensors(), None if divisors is None else divisors.data)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return tuple(int(length) for length in reversed(self._tensor(name).shape))

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor: float32, float16, bfloat16 or float64 as stored, or float32 dequantised."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of the first axis, dequantising no others."""
        found = self._tensor(name)
        if heads := self._permuted_heads(name):
            height = self.shape(name)[0]
            if height % (2 * heads):
                raise CheckpointError(
                    f"{self.path}: {name}: expected {heads} heads of an even size, found {height} rows"
                )
            return _floats(found.data[_file_rows(height, heads)[start:stop]], found)
        return _floats(found.data[start:stop], found)

    def _tensor(self, name: str) -> "ReaderTensor":
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: no tensor {name!r}; the file is incomplete or of another model")
        return self._stored[name]

    def _permuted_heads(self, name: str) -> int:
        if ".q_proj." in name:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".k_proj." in name else 0

    def _refuse_unreadable_types(self) -> None:
        of_each_type = {tensor.tensor_type: (name, tensor) for name, tensor in self._stored.items()}
        for name, tensor in of_each_type.values():
            try:
                _floats(tensor.data[:1], tensor)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{self.path}: {name}: expected floats or a quantisation that the gguf package "
                    f"reads, found {tensor.tensor_type.name}"
                ) from error

    def _of_tensors(self) -> dict[str, Any]:
        embedding = "model.embed_tokens.weight"
        biased = {name for name in self.names if name.endswith(".bias")}
        return {
            "vocab_size": self.shape(embedding)[0],
            "dtype": self.rows(embedding, 0, 1).dtype.name,
            "attention_bias": any(".self_attn." in name for name in biased),
            "mlp_bias": any(".mlp." in name for name in biased),
            "tie_word_embeddings": "lm_head.weight" not in self.names,
        }


def _checkpoint_name(path: Path, name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, module, kind = block.groups()
        if module in LINEAR_NAMES:
            return f"model.layers.{layer}.{LINEAR_NAMES[module]}.{kind}"
        if module in NORM_NAMES and kind == "weight":
            return f"model.layers.{layer}.{NORM_NAMES[module]}.weight"
    raise CheckpointError(
        f"{path}: tensor {name!r}: not part of a plain Llama, so the model computes something else; "
        "this is not supported"
    )


def _file_rows(rows: int, heads: int) -> np.ndarray:
    """For each row of a checkpoint's q_proj or k_proj, the row of the GGUF tensor that holds it.

    llama.cpp rotates neighbouring rows of a head, 2p and 2p + 1, where transformers rotates rows p and
    p + H/2; so the file stores the rows of each head interleaved.

    Source: llama.cpp, LlamaModel.permute in its conversion of Hugging Face checkpoints.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _floats(data: np.ndarray, tensor: "ReaderTensor") -> np.ndarray:
    """Stored rows as floats: a view of the mapped file where they are floats already."""
    from gguf.quants import dequantize

    stored, kind = np.asarray(data), tensor.tensor_type.name
    if kind in ("F64", "F32", "F16"):
        return stored
    if kind == "BF16":
        return stored.view(ml_dtypes.bfloat16)
    if not stored.size:  # which dequantize cannot take
        return np.zeros((0, int(tensor.shape[0])), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # weights that are not finite are named by whoever uses them
        return dequantize(stored, tensor.tensor_type)
