"""The named values of a forward pass that can be looked at, and a recorder for them."""

from collections.abc import Callable, Mapping

import numpy as np

from refengine.errors import InputError
from refengine.views import Vectors

Trace = Callable[[str, Vectors], None]

# Value of one layer -> its axes. In a trace it stands as "layers.3.self_attn.q_proj".
LAYER_POINTS: Mapping[str, str] = {
    "input_layernorm": "BTD",
    "self_attn.q_proj": "BTNH",
    "self_attn.k_proj": "BTKH",
    "self_attn.v_proj": "BTKH",
    "self_attn.q_rope": "BTNH",
    "self_attn.k_rope": "BTKH",
    "self_attn.k_cache": "BKSH",
    "self_attn.v_cache": "BKSH",
    "self_attn.attend": "BTNH",
    "self_attn.o_proj": "BTD",
    "self_attn.residual": "BTD",
    "post_attention_layernorm": "BTD",
    "mlp.gate_proj": "BTF",
    "mlp.up_proj": "BTF",
    "mlp.activation": "BTF",
    "mlp.down_proj": "BTD",
    "mlp.residual": "BTD",
}
MODEL_POINTS: Mapping[str, str] = {"embed_tokens": "BTD", "norm": "BTD", "lm_head": "BTV"}


def trace_points(num_hidden_layers: int) -> dict[str, str]:
    """Every point of a model, in the order of the forward pass, with its axes."""
    layers = {f"layers.{i}.{name}": axes for i in range(num_hidden_layers) for name, axes in LAYER_POINTS.items()}
    return {"embed_tokens": MODEL_POINTS["embed_tokens"], **layers, "norm": "BTD", "lm_head": "BTV"}


def no_trace(name: str, array: Vectors) -> None:
    """Looks at nothing."""


class Recorder:
    """A trace that keeps a copy of the points asked for in `arrays`.

    Args:
        points: names as `trace_points` gives them, or None for all.
    """

    def __init__(self, points: frozenset[str] | None = None):
        self.points = points
        self.arrays: dict[str, np.ndarray] = {}

    def __call__(self, name: str, array: Vectors) -> None:
        if self.points is None or name in self.points:
            self.arrays[name] = np.array(array)  # the engine reuses and overwrites its buffers

    def check(self, num_hidden_layers: int) -> "Recorder":
        """This recorder, if the model has every point it asks for; otherwise raises InputError."""
        unknown = sorted((self.points or frozenset()) - trace_points(num_hidden_layers).keys())
        if unknown:
            raise InputError(
                f"trace: no point {unknown[0]!r} in a model of {num_hidden_layers} layers; see "
                "refengine.trace.trace_points"
            )
        return self
