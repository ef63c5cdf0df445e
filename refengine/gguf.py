"""A GGUF file of a Llama as a checkpoint: Hugging Face names and row order, dequantised as far as it is read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from refengine.config import Config, RopeParameters
from refengine.errors import CheckpointError, ConfigError, MissingPackage
from refengine.rope import rope_inverse_frequencies

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField, ReaderTensor

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
ROPE_DIVISORS = "rope_freqs.weight"

# `llama.*` metadata: what is read, and what is accepted only with the value that changes nothing. A key in neither
# list is refused, since a setting that is not understood may change what the model computes.
NEEDED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
          "attention.layer_norm_rms_epsilon")
READ = (*NEEDED, "vocab_size", "tensor_data_layout", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.3; Llama 3.2


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: its metadata by key, and its tensors as they are stored, mapped and not read."""

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
            raise CheckpointError(f"{path}: not a whole GGUF file ({_line(error)}); copy or download it again") from error
        if reader.byte_order == "S":
            raise CheckpointError(f"{path}: expected a GGUF file in this machine's byte order, found the other one")
        return cls(path, reader)

    def value(self, key: str) -> Any:
        """The metadata value under `key`, or None where the file has none.

        A float32 is given as the shortest decimal that means it, which is the number its writer had: 1e-05, not 9.99e-06.
        """
        field = self.reader.fields.get(key)
        try:
            return None if field is None else _contents(field)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {key}: not readable ({_line(error)}); copy or download it again") from error

    def section(self, prefix: str) -> dict[str, Any]:
        """Every metadata value whose key starts with `prefix`, under the rest of its key."""
        return {key.removeprefix(prefix): self.value(key) for key in self.reader.fields if key.startswith(prefix)}


class GgufCheckpoint:
    """A `.gguf` file of architecture llama, under the names and in the row order of a Hugging Face checkpoint.

    Float tensors keep their dtype; quantised ones become float32, row by row: no more is dequantised than is asked for.
    The file says nothing of sliding windows, so a Mistral in GGUF is the full-attention Llama that llama.cpp runs.

    Raises:
        CheckpointError: no readable GGUF file, or one of another architecture, incomplete, or in a quantisation that
            the `gguf` package cannot read.
        ConfigError: the metadata ask for mathematics that is not supported.
        MissingPackage: the `gguf` package is not installed.

    Source: ggml, docs/gguf.md; llama.cpp, src/models/llama.cpp and conversion of LlamaForCausalLM.
    """

    def __init__(self, path: Path):
        self.path = path
        file = GgufFile.open(path)
        _refuse_other_models(file)
        stored = {tensor.name: tensor for tensor in file.reader.tensors}
        divisors = stored.pop(ROPE_DIVISORS, None)
        self._stored = {_checkpoint_name(path, name): tensor for name, tensor in stored.items()}
        self._refuse_unreadable_types()
        self.names = frozenset(self._stored)
        self.config = self._config(file, None if divisors is None else divisors.data)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return tuple(int(length) for length in reversed(self._tensor(name).shape))

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor: float32, float16, bfloat16 or float64 as stored, float32 where it is quantised."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of the first axis, dequantising no others."""
        found = self._tensor(name)
        if heads := self._permuted_heads(name):
            return _floats(found.data[_file_rows(self.shape(name)[0], heads)[start:stop]], found)
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
        for name, tensor in {tensor.tensor_type: (name, tensor) for name, tensor in self._stored.items()}.values():
            try:
                _floats(tensor.data[:1], tensor)
            except NotImplementedError as error:
                raise CheckpointError(f"{self.path}: {name}: expected floats or a quantisation that the gguf package "
                                      f"reads, found {tensor.tensor_type.name}") from error

    def _config(self, file: GgufFile, divisors_P: np.ndarray | None) -> Config:
        embedding = "model.embed_tokens.weight"
        rows, dtype = self.shape(embedding)[0], self.rows(embedding, 0, 1).dtype.name
        given = _config_json(file) | {
            "dtype": dtype,
            "attention_bias": any("self_attn" in name and name.endswith(".bias") for name in self.names),
            "mlp_bias": any("mlp" in name and name.endswith(".bias") for name in self.names),
            "tie_word_embeddings": "lm_head.weight" not in self.names,
        }
        given["vocab_size"] = given["vocab_size"] or rows
        try:
            given["rope_parameters"] = _rope_parameters(file, divisors_P, given["head_dim"])
            return Config.from_dict(given)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error


def _reader_class(path: Path) -> "type[GGUFReader]":
    """`gguf.GGUFReader` that stops at the end of the file and reads a list in one step.

    The reader as it comes takes what lies past the end for empty, and a vocabulary of 49 thousand in six seconds.
    """
    try:
        from gguf import GGUFReader, GGUFValueType
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
            element_type, count, start = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64), orig_offs + 12
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
            self._get(offset, np.uint64, count)  # each has a length at least: a count past the end of the file stops here
            for _ in range(count):
                length = int.from_bytes(plain[offset : offset + 8].tobytes(), "little" if self.byte_order == "I" else "big")
                self._get(offset + 8, np.uint8, length)
                found.append(plain[offset + 8 : offset + 8 + length])
                offset += 8 + length
            return found

    return Reader


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _contents(field: "ReaderField") -> Any:
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) and field.parts[-1].dtype == np.float32 else value


def _refuse_other_models(file: GgufFile) -> None:
    architecture = file.value("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file.path}: general.architecture: expected 'llama' (which is also what Mistral's GGUF "
                              f"files say), found {architecture!r}: this family is not supported")
    if (parts := file.value("split.count") or 1) > 1:
        raise CheckpointError(f"{file.path}: one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`")
    llama = file.section("llama.")
    for key in NEEDED:
        if key not in llama:
            raise CheckpointError(f"{file.path}: no metadata llama.{key}; the file is incomplete or not a language model")
    for key, value in llama.items():
        if key not in READ and (key not in NEUTRAL or value != NEUTRAL[key]):
            expected = f"expected {NEUTRAL[key]!r}" if key in NEUTRAL else "expected no such key"
            raise ConfigError(f"{file.path}: llama.{key}: found {value!r}, which may change the mathematics and is not "
                              f"supported; {expected}")


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
    raise CheckpointError(f"{path}: tensor {name!r}: not part of a plain Llama, so the model computes something else; not supported")


def _file_rows(rows: int, heads: int) -> np.ndarray:
    """For each row of a checkpoint's q_proj or k_proj, the row of the GGUF tensor that holds it.

    llama.cpp rotates neighbouring rows of a head (2p, 2p+1), transformers rows p and p + H/2, so GGUF files store the
    rows of each head interleaved.

    Source: llama.cpp, LlamaModel.permute in its conversion of Hugging Face checkpoints.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _floats(data: np.ndarray, tensor: "ReaderTensor") -> np.ndarray:
    """Stored rows as floats: a view of the mapped file where they are floats already."""
    from gguf.quants import dequantize

    kind = tensor.tensor_type.name
    if kind in ("F64", "F32", "F16"):
        return np.asarray(data)
    return np.asarray(data).view(ml_dtypes.bfloat16) if kind == "BF16" else dequantize(np.asarray(data), tensor.tensor_type)


def _config_json(file: GgufFile) -> dict[str, Any]:
    """Metadata under the keys of a config.json, without those that depend on the tensors."""
    llama = {key: _one_for_all_layers(value) for key, value in file.section("llama.").items()}
    heads = llama["attention.head_count"]
    head_dim = llama.get("attention.key_length") or llama["embedding_length"] // max(heads, 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if llama.get(key, head_dim) != head_dim:
            raise ConfigError(f"{file.path}: llama.{key}: expected the head size {head_dim}, found {llama[key]!r}")
    ends = (file.value(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama.get("vocab_size"),
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": llama["context_length"],
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
    }


def _one_for_all_layers(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _rope_parameters(file: GgufFile, divisors_P: np.ndarray | None, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` as in a config.json. Where the file gives no base it is 10000, and no type means linear.

    Source: llama.cpp, src/llama-model.cpp, `rope_freq_base (optional)` and the lines after it.
    """
    scaling = file.section("llama.rope.scaling.")
    theta = file.value("llama.rope.freq_base") or 10000.0
    factor = scaling.get("factor") or file.value("llama.rope.scale_linear") or 1.0
    rope_type = scaling.get("type", "linear")
    if rope_type == "none" or (rope_type == "linear" and factor == 1.0):
        return {"rope_theta": theta} | ({} if divisors_P is None else _llama3(divisors_P, theta, head_dim))
    if divisors_P is not None:
        raise ConfigError(f"{ROPE_DIVISORS}: found beside llama.rope.scaling.type {rope_type!r}; expected one of them")
    if rope_type == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if rope_type == "yarn":
        betas = {beta: scaling[f"yarn_{beta}"] for beta in ("beta_fast", "beta_slow") if f"yarn_{beta}" in scaling}
        original = scaling.get("original_context_length")
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original} | betas
    raise ConfigError(f"llama.rope.scaling.type: expected none, linear or yarn, found {rope_type!r}, which is not supported")


def _llama3(divisors_P: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 settings behind a file's table of frequency divisors, which is all that GGUF keeps of them."""
    if np.all(divisors_P == 1):
        return {}
    plain_P, _ = rope_inverse_frequencies(RopeParameters("default", theta), head_dim, 1, 1)
    for factor in (*LLAMA3_FACTORS, float(divisors_P.max())):
        settings = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192}
        scaled_P, _ = rope_inverse_frequencies(RopeParameters(rope_theta=theta, **settings), head_dim, 1, 1)
        # The table was written in float32, from frequencies rounded to float32: about 1e-6 at worst.
        if divisors_P.shape == plain_P.shape and np.allclose(divisors_P, plain_P / scaled_P, rtol=1e-5, atol=0.0):
            return settings
    raise ConfigError(f"{ROPE_DIVISORS}: these frequency divisors are not those of Llama 3.1 or 3.2 (low_freq_factor 1, "
                      "high_freq_factor 4, original_max_position_embeddings 8192) and cannot be turned into a configuration")
