"""Which causes can be at the place where a candidate first goes wrong, its inputs there being right."""

from collections.abc import Collection, Mapping

from verify.causes.catalogue import CATALOGUE

# Family of causes -> trace points, of a layer or of the model, at which one of them can show first.
FOOTPRINTS: Mapping[str, tuple[str, ...]] = {
    "rope": ("self_attn.q_rope", "self_attn.k_rope", "self_attn.k_cache"),
    # Exports may scale queries before they meet the keys.
    "attention": ("self_attn.q_rope", "self_attn.k_rope", "self_attn.attend", "self_attn.o_proj"),
    "cache": ("self_attn.k_cache", "self_attn.v_cache", "self_attn.attend"),
    "norm_mlp": ("input_layernorm", "post_attention_layernorm", "norm", "mlp."),
    "weights": ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "self_attn.", "mlp."),
}
# A buffer's empty slots are there in the prompts too, what one batch left is in those of the next, and codes may be
# what a prompt itself is read from; all other mistakes of caches are shown by steps after the prompts alone.
IN_PROMPTS = ("cache-capacity-as-length", "cache-not-reset", "cache-quantized")
AFTER_PROMPTS: Collection[str] = {name for name in CATALOGUE if name.startswith("cache-")}.difference(IN_PROMPTS)


def likely_at(point: str) -> list[str]:
    """Names of the causes that can show first at a trace point; "self_attn.attend" of any layer."""
    return [
        name for name, cause in CATALOGUE.items() if point.startswith(FOOTPRINTS.get(_family(cause.__module__), ()))
    ]


def _family(module: str) -> str:
    return module.rpartition(".")[2]
