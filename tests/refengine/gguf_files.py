"""GGUF files of a small Llama, written with the gguf package in the layout of llama.cpp's converter."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

D, F, N, K, H, V, LAYERS = 64, 160, 6, 2, 16, 40, 3

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": D,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": N,
    "llama.attention.head_count_kv": K,
    "llama.attention.key_length": H,
    "llama.attention.value_length": H,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": H,
    "llama.rope.freq_base": 50000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def weights_by_checkpoint_name(biases: bool = False, head: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if head:
        shapes["lm_head.weight"] = (V, D)
    modules = {
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        for module, shape in modules.items():
            shapes[f"model.layers.{layer}.{module}.weight"] = shape
            if biases:
                shapes[f"model.layers.{layer}.{module}.bias"] = shape[:1]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    for checkpoint_word, gguf_word in (
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ):
        name = name.replace(checkpoint_word, gguf_word)
    return name


def permuted_as_llama_cpp_does(name: str, tensor: np.ndarray) -> np.ndarray:
    heads = N if "q_proj" in name else K if "k_proj" in name else 0
    if not heads:
        return tensor
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray] | None = None,
    kind: Kind = Kind.F32,
    extra: dict[str, np.ndarray] | None = None,
    **changed: Any,
) -> Path:
    """`changed`: metadata by key with __ for a dot; None leaves the key out."""
    weights = weights_by_checkpoint_name() if weights is None else weights
    writer = gguf.GGUFWriter(path, "llama")
    metadata = METADATA | {key.replace("__", "."): value for key, value in changed.items()}
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        match value:
            case None:
                pass
            case str():
                writer.add_string(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case list():
                writer.add_array(key, value)
    for name, tensor in weights.items():
        stored = permuted_as_llama_cpp_does(name, tensor)
        tensor_kind = kind if stored.ndim == 2 else Kind.F32
        writer.add_tensor(gguf_name(name), quantize(stored, tensor_kind), raw_dtype=tensor_kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(theta: float, factor: float, original: int = 8192) -> np.ndarray:
    """The loop of llama.cpp's converter."""
    divisors = []
    for frequency in 1.0 / np.float32(theta) ** (np.arange(0, H, 2, dtype=np.float32) / np.float32(H)):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4.0:
            divisors.append(1.0)
        elif wavelength > original / 1.0:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)
