"""Checkpoints as GGUF files without a tokenizer, which llama.cpp can open."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from refengine.checkpoint import Checkpoint
from tests.refengine.gguf_files import gguf_name


def as_gguf(checkpoint: Checkpoint, path: Path, kind: Kind = Kind.F32, rope_theta: float | None = None) -> Path:
    """Writes a Llama's checkpoint; matrices are of this kind, all else is float32.

    Args:
        rope_theta: another one than the checkpoint's.
    """
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_theta or config.rope_parameters.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name in sorted(checkpoint.names):
        stored = np.asarray(checkpoint.tensor(name), np.float32)
        for module, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if module in name:  # the rows that rotary embedding turns together become neighbours
                halves = stored.reshape(heads, 2, config.head_dim // 2, -1)
                stored = halves.swapaxes(1, 2).reshape(stored.shape)
        tensor_kind = kind if stored.ndim == 2 else Kind.F32
        writer.add_tensor(gguf_name(name), quantize(stored, tensor_kind), raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
