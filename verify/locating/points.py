"""What each trace point is made of, and which operators are several of them at once."""

from collections.abc import Mapping, Sequence

BESIDE = ("self_attn.q_rope", "self_attn.k_rope", "self_attn.k_cache", "self_attn.attend")  # read tables or masks
AROUND = ("rope", "past")  # what a part is fed beside the stream
ADDED = ("self_attn.o_proj", "mlp.down_proj")  # to the stream
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
ATTENTIONS = ("GroupQueryAttention", "MultiHeadAttention", "Attention", "ScaledDotProductAttention")

# Trace point -> those that it is made of.
MADE_OF: Mapping[str, Sequence[str]] = {
    "input_layernorm": ["input"],
    "self_attn.q_proj": ["input_layernorm"],
    "self_attn.k_proj": ["input_layernorm"],
    "self_attn.v_proj": ["input_layernorm"],
    "self_attn.q_rope": ["self_attn.q_proj", "rope"],
    "self_attn.k_rope": ["self_attn.k_proj", "rope"],
    "self_attn.k_cache": ["self_attn.k_rope"],
    "self_attn.v_cache": ["self_attn.v_proj"],
    "self_attn.attend": ["self_attn.q_rope", "self_attn.k_cache", "self_attn.v_cache"],
    "self_attn.o_proj": ["self_attn.attend"],
    "self_attn.residual": ["self_attn.o_proj"],
    "post_attention_layernorm": ["input"],
    "mlp.gate_proj": ["post_attention_layernorm"],
    "mlp.up_proj": ["post_attention_layernorm"],
    "mlp.activation": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.activation"],
    "mlp.residual": ["mlp.down_proj"],
    "norm": ["input"],
    "lm_head": ["norm"],
}
