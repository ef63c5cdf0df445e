"""An export's own weights as a checkpoint: in its layout and order, however the export has them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.weights import EMBEDDING, HEAD, Weights
from tests.checkpoints import TINY, write_checkpoint
from verify.candidates.files import describe_candidate
from verify.inspection import exported_checkpoint
from verify.truth.reference import Reference
from verify.weights.cost import compare_predictions, cost_of_weights
from verify.weights.exported import ExportedCheckpoint
from verify.weights.match import match
from verify.weights.stored import StoredWeight, Values

EXPORTS = Path(__file__).parents[2] / "fixtures" / "exports"
HEAD_DIM = TINY["head_dim"]
Q, K, V = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")


@dataclass
class Stored:
    """A checkpoint's tensors as weights of an export, to be changed by name; reads are counted."""

    checkpoint: Checkpoint
    arrays: dict[str, np.ndarray] = field(init=False)
    reads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arrays = {name: self.checkpoint.tensor(name) for name in sorted(self.checkpoint.names)}

    def exported(self, *, in_rows: bool | None = True) -> ExportedCheckpoint:
        """What is read back; matrices have outputs as rows, unless said otherwise."""
        return ExportedCheckpoint(self.checkpoint, Path("export"), match(self.checkpoint, list(self._weights(in_rows))))

    def _weights(self, in_rows: bool | None) -> Iterator[StoredWeight]:
        for name, array in self.arrays.items():

            def read(name: str = name, array: np.ndarray = array) -> Values:
                self.reads.append(name)
                return Values(np.atleast_2d(array))

            shape, used_by = np.atleast_2d(array).shape, (name.rpartition(".")[0],)
            way_round = in_rows if array.ndim == 2 else None
            yield StoredWeight(name, shape, array.dtype.name, None, None, used_by, way_round, read)


@pytest.fixture
def stored(tmp_path) -> Stored:
    return Stored(open_checkpoint(write_checkpoint(tmp_path, attention_bias=True)))


def assert_the_checkpoints(own: ExportedCheckpoint, checkpoint: Checkpoint, rtol: float = 0) -> None:
    for name in own.names:
        tensor = checkpoint.tensor(name if name in checkpoint.names else EMBEDDING)
        np.testing.assert_allclose(own.tensor(name), tensor, rtol, 0, err_msg=name)
        np.testing.assert_allclose(own.rows(name, 2, 5), tensor[2:5], rtol, 0, err_msg=name)
        assert own.shape(name) == tensor.shape


@pytest.mark.parametrize("in_rows", [True, None])
def test_weights_that_are_stored_as_the_checkpoint_has_them_are_exact(stored, in_rows):
    own = stored.exported(in_rows=in_rows)
    assert (own.is_exact, own.is_faithful, own.borrowed) == (True, True, ())
    assert_the_checkpoints(own, stored.checkpoint)


def test_transposed_weights_are_turned_back(stored):
    stored.arrays = {name: np.ascontiguousarray(array.T) for name, array in stored.arrays.items()}
    own = stored.exported(in_rows=False)
    assert own.is_exact
    assert_the_checkpoints(own, stored.checkpoint)


def test_parts_of_a_fused_weight_are_cut_out_of_one_reading(stored):
    parts = [stored.arrays.pop(name) for name in (Q, K, V)]
    stored.arrays["model.layers.1.self_attn.qkv_proj.weight"] = np.concatenate(parts)
    assert_the_checkpoints(stored.exported(), stored.checkpoint)
    own = stored.exported()
    stored.reads.clear()
    for name in (Q, K, V):
        own.tensor(name)
    assert len(stored.reads) == 1


def dealt(weight_OI: np.ndarray) -> np.ndarray:
    """Outputs of each head with the two that are turned together side by side."""
    return weight_OI.reshape(-1, 2, HEAD_DIM // 2, weight_OI.shape[1]).swapaxes(1, 2).reshape(weight_OI.shape)


def test_rotary_pairs_that_are_neighbours_in_queries_and_keys_are_put_back(stored):
    for name in (Q, K):
        stored.arrays[name] = dealt(stored.arrays[name])
    for name in (Q.replace("weight", "bias"), K.replace("weight", "bias")):
        stored.arrays[name] = dealt(stored.arrays[name][:, None])[:, 0]
    own = stored.exported()
    assert own.is_exact
    assert_the_checkpoints(own, stored.checkpoint)


def test_rows_in_an_order_that_computes_something_else_stay_in_it(stored):
    stored.arrays[Q] = dealt(stored.arrays[Q])
    own = stored.exported()
    assert not own.is_faithful
    np.testing.assert_array_equal(own.tensor(Q), stored.arrays[Q])


def test_the_attentions_factor_is_taken_out_of_queries(stored):
    for name in (Q, Q.replace("weight", "bias")):
        stored.arrays[name] = (stored.arrays[name] * HEAD_DIM**-0.5).astype(np.float32)
    own = stored.exported()
    assert own.is_exact
    assert_the_checkpoints(own, stored.checkpoint, rtol=1.2e-7)


def test_a_tensor_that_is_not_the_checkpoints_is_taken_as_the_export_has_it(stored):
    name = "model.layers.2.mlp.up_proj.weight"
    stored.arrays[name] = np.roll(stored.arrays[name], 1, axis=0) * np.float32(1.01)
    own = stored.exported()
    assert (own.is_exact, own.is_faithful, own.borrowed) == (False, False, ())
    np.testing.assert_array_equal(own.tensor(name), stored.arrays[name])


def test_a_square_weight_that_is_turned_is_taken_as_the_export_uses_it(tmp_path):
    stored = Stored(open_checkpoint(write_checkpoint(tmp_path, num_attention_heads=4)))
    stored.arrays[Q] = np.ascontiguousarray(stored.arrays[Q].T)
    own = stored.exported()
    assert not own.is_faithful
    np.testing.assert_array_equal(own.tensor(Q), stored.arrays[Q])


def test_a_tensor_that_is_missing_is_the_checkpoints_and_is_listed(stored):
    del stored.arrays[V]
    own = stored.exported()
    assert (own.is_faithful, own.borrowed) == (False, (V,))
    assert_the_checkpoints(own, stored.checkpoint)


@pytest.mark.parametrize("resident", [True, False])
def test_a_tied_head_that_is_rounded_alone_is_a_tensor_of_its_own(tmp_path, resident):
    stored = Stored(open_checkpoint(write_checkpoint(tmp_path, tie_word_embeddings=True)))
    assert stored.exported().config.tie_word_embeddings
    stored.arrays[HEAD] = stored.arrays[EMBEDDING].astype(np.float16)
    own = stored.exported()
    assert (own.config.tie_word_embeddings, own.is_faithful, own.is_exact) == (False, True, False)
    weights = Weights.open(own, np.float32, resident)
    np.testing.assert_array_equal(weights.embed(np.arange(67)), stored.arrays[EMBEDDING])
    head = np.concatenate([piece.weight_OI for piece in weights.head()])
    np.testing.assert_array_equal(head, stored.arrays[HEAD].astype(np.float32))


def test_rows_of_an_embedding_are_taken_from_one_reading(stored):
    own = stored.exported()
    stored.reads.clear()
    Weights.open(own, np.float64, resident=False).embed(np.arange(20))
    assert stored.reads.count(EMBEDDING) == 1


@pytest.mark.parametrize(
    ("exporter", "stored_as"),
    [
        *(("dynamo", "float32"), ("genai", "float32"), ("optimum", "float32"), ("optimum-intel", "float32")),
        *(("genai-fp16", "float16"), ("genai-int4", "int4"), ("optimum-intel-int8", "int8")),
    ],
)
def test_the_weights_of_real_exporters_are_as_near_as_their_relations_say(tiny, exporter, stored_as):
    own = exported_checkpoint(tiny, describe_candidate(EXPORTS / exporter))
    errors = {each.relation.name: each.relation.error for each in own.matched}
    assert (own.is_faithful, own.stored_as, own.borrowed) == (True, stored_as, ())
    assert own.is_exact == (not any(errors.values()))
    for name in own.names:
        exact = tiny.tensor(name if name in tiny.names else EMBEDDING).astype(np.float64)
        difference = own.tensor(name) - exact
        found = np.sqrt(np.square(difference).sum() / np.square(exact).sum())
        assert found == pytest.approx(errors[name], rel=1e-6)


def test_weights_outside_the_file_are_read_through_the_links_that_model_caches_are_made_of(tiny, tmp_path):
    import onnx

    model = onnx.load(EXPORTS / "genai-int4" / "model.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").rename(tmp_path / "blob")
    (tmp_path / "weights").symlink_to(tmp_path / "blob")
    inside, outside = (
        exported_checkpoint(tiny, describe_candidate(path))
        for path in (EXPORTS / "genai-int4", tmp_path / "model.onnx")
    )
    for name in inside.names:
        np.testing.assert_array_equal(outside.tensor(name), inside.tensor(name))


def test_what_equal_weights_cost_is_nothing(stored):
    run = Reference(stored.checkpoint).run([[3, 1, 4, 1, 5], [9, 2]], 3)
    cost = cost_of_weights(run, stored.exported())
    assert (cost.tokens, cost.changed) == (6, 0)
    assert cost.largest_divergence < 1e-12
    assert cost.own_perplexity == pytest.approx(cost.perplexity, rel=1e-12)


def test_cost_is_what_its_definitions_say(stored):
    run = Reference(stored.checkpoint).run([[3, 1, 4, 1, 5], [9, 2]], 3)
    exact_PV = run.logits.value64_PX
    own_PV = exact_PV + np.random.default_rng(0).standard_normal(exact_PV.shape)
    cost = compare_predictions(run, own_PV)
    p, q = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) for logits in (exact_PV, own_PV))
    divergence_P = (p * np.log(p / q)).sum(axis=1)
    following = [1, 4, 1, 5, *run.tokens[0], 2, *run.tokens[1]]
    at = np.arange(len(following))
    choices = own_PV.argmax(axis=1)
    assert cost.divergence == pytest.approx(divergence_P.mean())
    assert cost.largest_divergence == pytest.approx(divergence_P.max())
    assert cost.perplexity == pytest.approx(np.prod(p[at, following]) ** (-1 / len(at)))
    assert cost.own_perplexity == pytest.approx(np.prod(q[at, following]) ** (-1 / len(at)))
    right = [*run.tokens[0], *run.tokens[1]]
    assert cost.changed == np.count_nonzero(choices[[4, 5, 6, 8, 9, 10]] != right) > 0
