"""One layer of attention with a cache, by OpenVINO's CPU plugin and by the reference."""

from collections.abc import Mapping

import numpy as np
import openvino
from openvino import Model, PartialShape, Type, opset6
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo

from refengine.config import Config
from refengine.kvcache import KVCache
from refengine.ops import attend, attention_mask
from refengine.scheme import Scheme
from tests.checkpoints import TINY

B, N, K = 4, 6, 2


class OpenVINOLayer:
    """Attention in OpenVINO, its arithmetic in float32.

    Args:
        head_dim: of every head.
        settings: what else the plugin is told, by the names of its properties.
    """

    def __init__(self, head_dim: int, settings: Mapping[str, str]):
        everything = {"INFERENCE_PRECISION_HINT": "f32", **settings}
        compiled = openvino.Core().compile_model(_graph(head_dim), "CPU", everything)
        kinds = {node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()}
        assert "ScaledDotProductAttention" in kinds, "not recognised, so nothing would be quantised"
        self._head_dim, self._tokens = head_dim, 0
        self._request = compiled.create_infer_request()

    def reset(self) -> None:
        """Empties the cache."""
        self._request.reset_state()
        self._tokens = 0

    def step(self, q_BTNH: np.ndarray, k_BKTH: np.ndarray, v_BKTH: np.ndarray) -> np.ndarray:
        """Adds tokens, which see those before them; returns `y_BTNH`."""
        T = k_BKTH.shape[2]
        allowed_BTS = attention_mask(_positions(self._tokens, T), _positions(0, self._tokens + T), None)
        return self._infer(q_BTNH, k_BKTH, v_BKTH, allowed_BTS)

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, as the plugin decodes its state."""
        states = {state.name: state.state.data.copy() for state in self._request.query_state()}
        return states["k"], states["v"]

    def values_attended(self) -> np.ndarray:
        """The values that attention reads: as many tokens are added, each of which sees one of those before."""
        T, H = self._tokens, self._head_dim
        none_BKTH = np.zeros((B, K, T, H), np.float32)
        y_BTNH = self._infer(
            np.zeros((B, T, N, H), np.float32), none_BKTH, none_BKTH, np.eye(T, 2 * T, dtype=bool)[None]
        )
        return y_BTNH[:, :, :: N // K].swapaxes(1, 2)

    def _infer(self, q_BTNH: np.ndarray, k_BKTH: np.ndarray, v_BKTH: np.ndarray, allowed_BTS: np.ndarray) -> np.ndarray:
        self._tokens += k_BKTH.shape[2]
        given = {
            "q": np.ascontiguousarray(q_BTNH.swapaxes(1, 2)),
            "k": k_BKTH,
            "v": v_BKTH,
            "mask": np.where(allowed_BTS, np.float32(0), np.float32(-np.inf))[:, None],
            "beam_idx": np.arange(B, dtype=np.int32),
        }
        return self._request.infer(given)[0].swapaxes(1, 2)


class ReferenceLayer:
    """The same by the reference, with a cache that stores as `scheme` says."""

    def __init__(self, head_dim: int, scheme: Scheme):
        sizes = {"num_hidden_layers": 1, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": head_dim}
        self._cache = KVCache(Config.from_dict(TINY | sizes), B, scheme)
        self._fed: list[tuple[np.ndarray, np.ndarray]] = []

    def step(self, q_BTNH: np.ndarray, k_BKTH: np.ndarray, v_BKTH: np.ndarray) -> np.ndarray:
        """Adds tokens, which see those before them; returns `y_BTNH`."""
        self._fed.append((k_BKTH, v_BKTH))
        positions_BT = _positions(self._cache.length, k_BKTH.shape[2])
        k_BKSH, v_BKSH, positions_BS = self._cache.update(0, k_BKTH, v_BKTH, positions_BT)
        return attend(q_BTNH, k_BKSH, v_BKSH, positions_BT, positions_BS, None)

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, decoded."""
        return self._cache.read(0, np.float32)

    def fed(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values as they came."""
        k_BKSH, v_BKSH = (np.concatenate(passes, axis=2) for passes in zip(*self._fed, strict=True))
        return k_BKSH, v_BKSH


def _positions(start: int, tokens: int) -> np.ndarray:
    return np.tile(np.arange(start, start + tokens), (B, 1))


def _graph(head_dim: int) -> Model:
    """What the plugin recognises and replaces by an operator with a cache of its own.

    A past that is read, reordered by `beam_idx`, joined with what is new, and written back; repeated for the queries of
    a group; and scaled dot-product attention.
    """
    heads = {"q": N, "k": K, "v": K}
    inputs = {name: ops.parameter([-1, n, -1, head_dim], Type.f32, name=name) for name, n in heads.items()}
    inputs["mask"] = ops.parameter([-1, 1, -1, -1], Type.f32, name="mask")
    inputs["beam_idx"] = ops.parameter([-1], Type.i32, name="beam_idx")
    first = ops.constant(0)
    rows = ops.gather(ops.shape_of(inputs["q"]), ops.constant([0]), first)
    nothing = ops.broadcast(ops.constant(np.float32(0)), ops.concat([rows, ops.constant([K, 0, head_dim])], 0))
    written, repeated = [], []
    for name in ("k", "v"):
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = PartialShape([-1, K, -1, head_dim]), Type.f32, name
        variable = Variable(info)
        past = ops.gather(opset6.read_value(nothing, variable), inputs["beam_idx"], first)
        present = ops.concat([past, inputs[name]], 2)
        written.append(opset6.assign(present, variable))
        groups = ops.constant([1, 1, N // K, 1, 1])
        for_groups = ops.broadcast(ops.unsqueeze(present, ops.constant(2)), groups, broadcast_spec="BIDIRECTIONAL")
        repeated.append(ops.reshape(for_groups, ops.constant([0, N, -1, head_dim]), True))
    y = ops.scaled_dot_product_attention(inputs["q"], *repeated, inputs["mask"], causal=False)
    return Model([ops.result(y)], written, list(inputs.values()), "attention")
