"""Which part of a decoder a weight serves, as far as exporters' names say it."""

import re
from collections.abc import Iterable, Mapping

from refengine.weights import EMBEDDING, HEAD

LAYER = re.compile(r"\blayers?[._/](\d+)\b")
MODULE = re.compile(
    r"qkv_proj|gate_up_proj|[qkvo]_proj|gate_proj|up_proj|down_proj|input_layernorm|post_attention_layernorm"
    r"|embed_tokens|lm_head|final_norm|\bmodel[./]norm\b"
)
NORM = "model.norm"
OUTSIDE: Mapping[str, str] = {  # modules that are in no layer, by the names that exporters give them
    "embed_tokens": EMBEDDING.removesuffix(".weight"),
    "lm_head": HEAD.removesuffix(".weight"),
    "final_norm": NORM,
    "model.norm": NORM,
    "model/norm": NORM,
}
PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def places(used_by: Iterable[str], name: str) -> frozenset[str]:
    """The checkpoint's modules, such as "model.layers.3.self_attn.q_proj", that a weight serves; none if unknown.

    Args:
        used_by: names of the operators that use it. They decide: a weight serves where it is used.
        name: its own name in the graph, asked when they say nothing.
    """
    found = frozenset(module for text in used_by for module in _modules(text))
    return found or frozenset(_modules(name))


def _modules(text: str) -> list[str]:
    named, layer = MODULE.findall(text), LAYER.findall(text)
    if not named:
        return []
    module = named[-1]
    if module in OUTSIDE:
        return [OUTSIDE[module]]
    if not layer:
        return []
    prefix = f"model.layers.{layer[-1]}"
    if module.endswith("layernorm"):
        return [f"{prefix}.{module}"]
    part = "mlp" if module in ("gate_proj", "up_proj", "down_proj", "gate_up_proj") else "self_attn"
    return [f"{prefix}.{part}.{alone}" for alone in PARTS.get(module, (module,))]
