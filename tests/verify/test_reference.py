"""The reference's run: the right tokens whatever is guessed, and a file that keeps it and is refused elsewhere."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.errors import CheckpointError, InputError
from refengine.generate import generate
from refengine.model import forward
from refengine.trace import Recorder
from refengine.weights import Weights
from tests.checkpoints import write_checkpoint
from verify.truth.noise import ONE_BIT
from verify.truth.reference import Reference, ReferenceRun
from verify.truth.saved_reference import load_reference, save_reference

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
NEW, SHA = 6, 64 * "a"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Checkpoint:
    """A checkpoint every token of which is an end token, as the worst that a run that goes on can meet."""
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("small"), eos_token_id=list(range(67))))


@pytest.fixture(scope="module")
def run(small) -> ReferenceRun:
    return Reference(small).run(PROMPTS, NEW)


@pytest.fixture
def saved(run, tmp_path) -> Path:
    save_reference(tmp_path / "reference.npz", run, SHA)
    return tmp_path / "reference.npz"


def assert_same(one: ReferenceRun, other: ReferenceRun) -> None:
    """Bit for bit."""
    assert (one.prompts, one.tokens) == (other.prompts, other.tokens)
    assert one.caches.keys() == other.caches.keys()
    np.testing.assert_array_equal(one.flips_P, other.flips_P)
    for mine, theirs in zip((one.logits, *one.caches.values()), (other.logits, *other.caches.values()), strict=True):
        np.testing.assert_array_equal(mine.value64_PX, theirs.value64_PX)
        np.testing.assert_array_equal(mine.noise.rms_P, theirs.noise.rms_P)
        assert (mine.noise.overall_bound, mine.noise.position_bound) == (
            theirs.noise.overall_bound,
            theirs.noise.position_bound,
        )


def endless(checkpoint: Checkpoint) -> Weights:
    weights = Weights.open(checkpoint, np.float64)
    return replace(weights, config=replace(weights.config, eos_token_id=()))


def test_the_tokens_are_those_of_greedy_decoding_past_every_end_token(small, run):
    assert run.tokens == generate(endless(small), PROMPTS, NEW)
    assert run.lengths == [len(prompt) + NEW - 1 for prompt in PROMPTS]


def test_logits_and_caches_are_those_of_each_row_alone_in_float64(small, run):
    """Row after row, and of the caches the keys after rotation."""
    ends = np.cumsum([0, *run.lengths])
    points = frozenset(run.caches)
    assert points == {f"layers.{layer}.self_attn.{kind}_cache" for layer in range(3) for kind in "kv"}
    for prompt, new, (start, end) in zip(PROMPTS, run.tokens, pairwise(ends), strict=True):
        fed, recorder = np.array([[*prompt, *new[:-1]]]), Recorder(points)
        logits_BTV = forward(endless(small), fed, np.arange(fed.shape[1])[None], trace=recorder)
        np.testing.assert_allclose(run.logits.value64_PX[start:end], logits_BTV[0], rtol=0, atol=1e-12)
        for point, x_BKSH in recorder.arrays.items():
            rows = x_BKSH[0].swapaxes(0, 1).reshape(fed.shape[1], -1)
            np.testing.assert_allclose(run.caches[point].value64_PX[start:end], rows, rtol=0, atol=1e-12)


def test_the_noise_is_that_of_float32(run):
    sizes = np.sqrt(np.mean(np.square(run.logits.value64_PX), axis=-1))
    assert (run.logits.noise.rms_P > 1e-8 * sizes).all()
    assert (run.logits.noise.rms_P < 1e-5 * sizes).all()
    assert (run.flips_P >= run.logits.noise.rms_P).all()
    assert ONE_BIT <= run.logits.noise.overall_bound <= run.logits.noise.position_bound < 100


def test_a_right_guess_gives_what_no_guess_gives(small, run):
    assert_same(Reference(small).run(PROMPTS, NEW, guess=run.tokens), run)


@pytest.mark.parametrize(("row", "step"), [(0, 0), (1, 3), (2, NEW - 1)])
def test_a_wrong_guess_gives_the_references_own_tokens(small, run, row, step):
    guess = [list(new) for new in run.tokens]
    guess[row][step] = (guess[row][step] + 1) % 67
    assert_same(Reference(small).run(PROMPTS, NEW, guess=guess), run)


def test_only_a_wrong_guess_is_decoded_step_by_step(small, run):
    for guess, decoded in ((run.tokens, False), ([[0] * NEW] * 3, True)):
        told: list[str] = []
        Reference(small, told.append).run(PROMPTS, NEW, guess=guess)
        assert any("decodes its own tokens" in what for what in told) == decoded


def test_long_prompts_in_several_passes_give_what_each_gives_alone(small):
    """Nine rows of a hundred tokens are more than one pass holds."""
    prompts = np.random.default_rng(3).integers(0, 67, (9, 100)).tolist()
    together, alone = (Reference(small).run(rows, 2) for rows in (prompts, prompts[4:5]))
    assert together.tokens[4] == alone.tokens[0]
    rows = slice(4 * 101, 5 * 101)
    np.testing.assert_allclose(together.logits.value64_PX[rows], alone.logits.value64_PX, rtol=0, atol=1e-11)


def test_weights_that_are_not_finite_are_named(tmp_path):
    path = write_checkpoint(tmp_path / "checkpoint")
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensor(path, name, lambda tensor: tensor * np.where(np.arange(tensor.shape[1]) == 3, np.nan, 1))
    with pytest.raises(CheckpointError, match=rf"{name}: expected finite weights, found 56 NaN or infinite"):
        Reference(open_checkpoint(path)).run(PROMPTS, NEW)


def change_tensor(checkpoint: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name] = change(tensors[name]).astype(tensors[name].dtype)
    save_file(tensors, checkpoint / "model.safetensors")


def test_a_layer_whose_values_are_all_zero_has_noise_that_can_be_divided_by(tmp_path):
    path = write_checkpoint(tmp_path / "checkpoint")
    change_tensor(path, "model.layers.1.self_attn.v_proj.weight", np.zeros_like)
    run = Reference(open_checkpoint(path)).run(PROMPTS, NEW)
    noise = run.caches["layers.1.self_attn.v_cache"].noise
    assert np.isfinite([noise.overall_bound, noise.position_bound]).all()


def test_a_saved_run_is_loaded_as_it_was(run, saved):
    assert_same(load_reference(saved, SHA, PROMPTS, NEW), run)


def test_prompts_of_numpy_integers_and_tuples_are_the_same_prompts(run, saved):
    prompts = [tuple(np.array(prompt)) for prompt in PROMPTS]
    assert_same(load_reference(saved, SHA, prompts, NEW), run)


@pytest.mark.parametrize(
    ("sha", "prompts", "new", "message"),
    [
        (64 * "b", PROMPTS, NEW, r"made from a model of sha256 aaaaaaaaaaaa, this one has bbbbbbbbbbbb"),
        (SHA, PROMPTS[::-1], NEW, "made from other prompts"),
        (SHA, PROMPTS[:2], NEW, "made from other prompts"),
        (SHA, [*PROMPTS[:2], PROMPTS[2][:-1]], NEW, "made from other prompts"),
        (SHA, PROMPTS, NEW + 1, "made with --max-new-tokens 6, asked for 7"),
        (SHA, PROMPTS, NEW - 1, "made with --max-new-tokens 6, asked for 5"),
    ],
)
def test_a_saved_run_of_something_else_is_refused(saved, sha, prompts, new, message):
    with pytest.raises(InputError, match=rf"reference\.npz: {message}.*--save-reference"):
        load_reference(saved, sha, prompts, new)


def rewrite(saved: Path, header: Callable[[dict], object] = lambda given: given, **arrays: np.ndarray | None) -> None:
    """Changes the header of a saved run, and some of its arrays (None: leaves it out)."""
    with np.load(saved) as file:
        kept = {name: file[name] for name in file.files} | {
            name.replace("__", "/"): new for name, new in arrays.items()
        }
    kept["header"] = np.array(json.dumps(header(json.loads(str(kept["header"])))))
    np.savez(saved, **{name: array for name, array in kept.items() if array is not None})


NOT_OURS = {
    "no model": {"header": lambda given: {key: given[key] for key in given if key != "model_sha256"}},
    "another format": {"header": lambda given: given | {"format": 3}},
    "a model that is no text": {"header": lambda given: given | {"model_sha256": None}},
    "no header": {"header": lambda given: [given]},
    "tokens that are no lists": {"header": lambda given: given | {"tokens": [1, 2, 3]}},
    "tokens of fewer rows": {"header": lambda given: given | {"tokens": given["tokens"][:2]}},
    "no logits": {"lm_head__value64": None},
    "no flips": {"flips_P": None},
    "flips of other positions": {"flips_P": np.zeros(3)},
    "logits of other positions": {"lm_head__value64": np.zeros((3, 67))},
    "noise of other positions": {"lm_head__rms": np.zeros(3)},
    "bounds of another shape": {"lm_head__bounds": np.zeros(3)},
}


@pytest.mark.parametrize("changes", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_a_file_that_holds_no_saved_run_is_refused(saved, changes):
    rewrite(saved, **changes)
    with pytest.raises(InputError, match=r"reference\.npz: .*make (one|it again) with --save-reference"):
        load_reference(saved, SHA, PROMPTS, NEW)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(InputError, match=r"other: not a whole reference run \(File is not a zip file\)"):
        load_reference(tmp_path / "other", SHA, PROMPTS, NEW)


def test_a_saved_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone: not a whole reference run \(.*No such file"):
        load_reference(tmp_path / "gone", SHA, PROMPTS, NEW)


def test_a_pickle_inside_is_never_loaded(saved):
    rewrite(saved, flips_P=np.array([object()], dtype=object))
    with pytest.raises(InputError, match=r"not a whole reference run \(Object arrays cannot be loaded"):
        load_reference(saved, SHA, PROMPTS, NEW)


def test_a_file_that_lists_fewer_trace_points_than_were_saved_is_refused(saved):
    with np.load(saved) as file:
        kept = {name: file[name] for name in file.files if not name.startswith("layers.1.self_attn.k_cache")}
    np.savez(saved, **kept)
    with pytest.raises(InputError, match="trace points"):
        load_reference(saved, SHA, PROMPTS, NEW)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # Near either end, where the headers are.
    damage=st.lists(st.tuples(st.integers(-3000, 399), st.integers(0, 255)), min_size=1, max_size=4),
    half=st.booleans(),
)
def test_a_damaged_file_is_refused_or_gives_what_was_saved(saved, damage, half):
    content = bytearray(saved.read_bytes())
    for place, value in damage:
        content[place] = value
    damaged = saved.with_name("damaged.npz")
    damaged.write_bytes(content[: len(content) // 2] if half else content)
    try:
        assert_same(load_reference(damaged, SHA, PROMPTS, NEW), load_reference(saved, SHA, PROMPTS, NEW))
        line = str(damaged)
    except InputError as error:
        line = str(error)
    assert line.startswith(str(damaged))
    assert "\n" not in line


def test_nothing_is_left_where_a_run_cannot_be_saved(run, tmp_path):
    (tmp_path / "directory").mkdir()
    for place, message in (("nowhere/reference.npz", "no such directory"), ("directory", "is a directory")):
        with pytest.raises(InputError, match=f"{place}: {message}"):
            save_reference(tmp_path / place, run, SHA)
    assert [path.name for path in tmp_path.rglob("*")] == ["directory"]


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(run, saved):
    saved.write_bytes(b"old")
    save_reference(saved, run, SHA)
    assert_same(load_reference(saved, SHA, PROMPTS, NEW), run)
    assert [path.name for path in saved.parent.iterdir()] == ["reference.npz"]
