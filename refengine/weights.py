"""Checkpoint tensors as the forward pass wants them: one layer at a time from the map, or all of them kept."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.config import Config
from refengine.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BYTES = 64 * 2**20  # a streamed head is read, cast and applied in pieces of at most this size


@dataclass(frozen=True)
class Linear:
    """A linear map as the checkpoint stores it: `weight_OI` (outputs, inputs), and a bias or None."""

    weight_OI: np.ndarray
    bias_O: np.ndarray | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Projections that read the same input are stacked: q, k, v (`qkv_proj`) and gate, up."""

    input_layernorm_D: np.ndarray
    qkv_proj: Linear
    o_proj: Linear
    post_attention_layernorm_D: np.ndarray
    gate_up_proj: Linear
    down_proj: Linear


@dataclass(frozen=True)
class Weights:
    """The weights of one checkpoint in one dtype; `streamed` and `resident` differ in what they keep, not in values.

    Attributes:
        embed: token ids (any shape) -> their embeddings, with D as a last axis.
        layers: the decoder layers from first to last, afresh at each call.
        norm_D: the weight of the last norm.
        head: lm_head in pieces of consecutive vocabulary rows.
    """

    config: Config
    dtype: np.dtype
    embed: Callable[[np.ndarray], np.ndarray]
    layers: Callable[[], Iterable[Layer]]
    norm_D: np.ndarray
    head: Callable[[], Iterable[Linear]]

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: np.typing.DTypeLike = np.float32, resident: bool = True) -> "Weights":
        """The checkpoint's weights cast to `dtype`: read once and kept, or (not `resident`) read at each use.

        Raises:
            CheckpointError: a tensor is missing, has another shape than the configuration says, or is not finite.
        """
        read = _Reader(checkpoint, np.dtype(dtype))
        check_names_and_shapes(checkpoint)
        read.check_tied_head()
        if not resident:
            return cls(
                checkpoint.config,
                read.dtype,
                read.embed,
                read.layers,
                read("model.norm.weight"),
                read.head_pieces,
            )
        embedding_VD = read(EMBEDDING)
        layers = list(read.layers())
        head = [Linear(embedding_VD if read.head_name == EMBEDDING else read(HEAD))]
        return cls(
            checkpoint.config,
            read.dtype,
            embedding_VD.__getitem__,
            lambda: layers,
            read("model.norm.weight"),
            lambda: head,
        )


@dataclass(frozen=True)
class _Reader:
    """Finite tensors of a checkpoint, cast."""

    checkpoint: Checkpoint
    dtype: np.dtype

    @property
    def head_name(self) -> str:
        return EMBEDDING if self.checkpoint.config.tie_word_embeddings else HEAD

    def __call__(self, name: str) -> np.ndarray:
        return self._cast(name, self.checkpoint.tensor(name))

    def _cast(self, name: str, stored: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # found as an infinite value below
            tensor = np.ascontiguousarray(stored, dtype=self.dtype)
        if not np.isfinite(tensor).all():
            bad = int(tensor.size - np.count_nonzero(np.isfinite(tensor)))
            raise CheckpointError(
                f"{self.checkpoint.path}: {name}: expected finite weights, found {bad} NaN or infinite values as "
                f"{self.dtype}"
            )
        return tensor

    def _stacked(self, prefix: str, *modules: str) -> Linear:
        names = [f"{prefix}.{module}" for module in modules]
        weights = [self(f"{name}.weight") for name in names]
        biases = [self(f"{name}.bias") for name in names if f"{name}.bias" in self.checkpoint.names]
        if len(names) == 1:
            return Linear(weights[0], biases[0] if biases else None)
        return Linear(np.concatenate(weights), np.concatenate(biases) if biases else None)

    def check_tied_head(self) -> None:
        """A head beside tied embeddings is the embedding again, or nobody can know which is meant."""
        if self.head_name == HEAD or HEAD not in self.checkpoint.names:
            return
        for start, stop in self._pieces():
            if not np.array_equal(
                self.checkpoint.rows(HEAD, start, stop), self.checkpoint.rows(EMBEDDING, start, stop)
            ):
                raise CheckpointError(
                    f"{self.checkpoint.path}: {HEAD}: expected a copy of {EMBEDDING}, since config.json says "
                    "tie_word_embeddings, found another tensor; remove it, or set tie_word_embeddings to false"
                )

    def layers(self) -> Iterator[Layer]:
        for index in range(self.checkpoint.config.num_hidden_layers):
            prefix = f"model.layers.{index}"
            yield Layer(
                input_layernorm_D=self(f"{prefix}.input_layernorm.weight"),
                qkv_proj=self._stacked(f"{prefix}.self_attn", "q_proj", "k_proj", "v_proj"),
                o_proj=self._stacked(f"{prefix}.self_attn", "o_proj"),
                post_attention_layernorm_D=self(f"{prefix}.post_attention_layernorm.weight"),
                gate_up_proj=self._stacked(f"{prefix}.mlp", "gate_proj", "up_proj"),
                down_proj=self._stacked(f"{prefix}.mlp", "down_proj"),
            )

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """Gathers only the rows asked for from the map."""
        used, place = np.unique(token_ids, return_inverse=True)
        rows = [self.checkpoint.rows(EMBEDDING, int(token), int(token) + 1) for token in used]
        return self._cast(EMBEDDING, np.concatenate(rows))[place.reshape(token_ids.shape)]

    def head_pieces(self) -> Iterator[Linear]:
        for start, stop in self._pieces():
            yield Linear(self._cast(self.head_name, self.checkpoint.rows(self.head_name, start, stop)))

    def _pieces(self) -> Iterator[tuple[int, int]]:
        rows, width = self.checkpoint.shape(self.head_name)
        step = max(1, HEAD_BYTES // (width * self.dtype.itemsize))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


def expected_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a checkpoint of `config` must hold: pairs of its checkpoint name and its shape."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    NH = config.num_attention_heads * config.head_dim
    KH = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (NH, D), "k_proj": (KH, D), "v_proj": (KH, D), "o_proj": (D, NH)}
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    yield EMBEDDING, (V, D)
    yield "model.norm.weight", (D,)
    if not config.tie_word_embeddings:
        yield HEAD, (V, D)
    for index in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{index}.{norm}.weight", (D,)
        for part, modules, biased in (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias)):
            for module, shape in modules.items():
                yield f"model.layers.{index}.{part}.{module}.weight", shape
                if biased:
                    yield f"model.layers.{index}.{part}.{module}.bias", shape[:1]


def check_names_and_shapes(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError at the first tensor that is missing, misshapen, or that the configuration denies."""
    where, known = checkpoint.path, set()
    for name, shape in expected_shapes(checkpoint.config):
        if name not in checkpoint.names:
            raise CheckpointError(f"{where}: no tensor {name!r}; the checkpoint is incomplete or of another model")
        if checkpoint.shape(name) != shape:
            found = checkpoint.shape(name)
            raise CheckpointError(f"{where}: {name}: expected shape {shape} from config.json, found {found}")
        known.add(name)
    for name in sorted(checkpoint.names - known):
        # A stored rotary table and the copy of a tied head repeat what the configuration says.
        if name != HEAD and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{where}: {name}: not part of the model that config.json describes "
                "(a bias it denies, or another family)"
            )
