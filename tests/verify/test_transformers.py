"""transformers as a candidate: a checkpoint directory on torch."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from tests.checkpoints import write_checkpoint
from tests.verify.comparing import Compared
from verify.errors import NoVerdict

pytest.importorskip("torch", reason="torch is not installed")

TINY = Path(__file__).parents[2] / "fixtures" / "tiny_llama"
PROMPTS = [[5, 17, 44, 80, 3, 9, 121], [200, 31, 7], [64, 65, 66, 67, 68]]


@pytest.fixture(scope="module")
def compared() -> Compared:
    found = Compared(open_checkpoint(TINY), PROMPTS, 12)
    assert found.reference  # run once, for every test that expects the exact one
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_checkpoint_is_equal_with_its_cache_and_without_it_in_one_padded_batch(
    compared: Compared, attention: str
) -> None:
    found = compared.cells(TINY, "transformers", {"attn_implementation": attention})
    assert {(mode, cell.verdict, cell.batch_size) for mode, cell in found.items()} == {
        ("off", "equal", 3),
        ("on", "equal", 3),
    }
    for cell in found.values():
        assert cell.settings["effective"]["attn_implementation"] == attention
        assert len(cell.noise_ratio.cache) == 24
        assert not cell.noise_ratio.cache_beyond


def test_its_settings_can_be_read_where_there_is_no_torch(compared: Compared) -> None:
    settings = compared.open(TINY, "transformers").settings
    assert {type(value) for value in settings.effective.values()} == {str, int}


def test_rows_join_and_leave_its_past(compared: Compared) -> None:
    found = compared.cells(TINY, "transformers", batching="continuous", batch_size=2)
    assert {(cell.verdict, cell.batching) for cell in found.values()} == {("equal", "continuous")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_dtype_drifts_and_is_explained_by_its_arithmetic(compared: Compared, dtype: str) -> None:
    options = {"dtype": dtype}
    exact = compared.cells(TINY, "transformers", options)
    assert {cell.verdict for cell in exact.values()} <= {"drift", "mismatch"}
    found = compared.cells(TINY, "transformers", options, expectation=None)
    assert {(mode, cell.verdict, cell.expect) for mode, cell in found.items()} == {
        ("off", "equal", dtype),
        ("on", "equal", dtype),
    }


def test_a_window_shorter_than_the_prompt_is_equal_as_rows_join_and_leave(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4)
    windowed = Compared(open_checkpoint(path), [[5, 17, 44, 60, 3, 9, 21], [50, 31, 7], [64, 65, 66, 1, 2]], 6)
    for batching in ("static", "continuous"):
        found = windowed.cells(path, "transformers", batching=batching, batch_size=2)
        assert {cell.verdict for cell in found.values()} == {"equal"}


def changed(directory: Path, **config: object) -> Path:
    shutil.copytree(TINY, directory, dirs_exist_ok=True)
    said = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(said))
    return directory


def test_another_epsilon_is_not_equal(compared: Compared, tmp_path: Path) -> None:
    found = compared.cells(changed(tmp_path, rms_norm_eps=1e-3), "transformers")
    assert {cell.verdict for cell in found.values()} <= {"drift", "mismatch"}


def test_a_checkpoint_of_another_model_is_refused(compared: Compared, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, architectures=["LlamaForCausalLM"], hidden_size=42)
    with pytest.raises(InputError, match="candidate has 3 layers, checkpoint 12"):
        compared.open(path, "transformers")


def test_a_configuration_that_it_does_not_take_is_no_verdict(compared: Compared, tmp_path: Path) -> None:
    with pytest.raises(NoVerdict, match=r"hidden size \(91\) is not a multiple") as refused:
        compared.open(changed(tmp_path, hidden_size=91), "transformers")
    assert "\n" not in str(refused.value)


def test_a_missing_tensor_is_refused_and_not_made_up(compared: Compared, tmp_path: Path) -> None:
    file = changed(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.5.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"no tensor 'model\.layers\.5\.mlp\.up_proj\.weight'"):
        compared.open(tmp_path, "transformers")


def test_weights_cut_short_are_no_verdict_in_one_line(compared: Compared, tmp_path: Path) -> None:
    file = changed(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(NoVerdict, match="transformers cannot load it") as refused:
        compared.open(tmp_path, "transformers")
    assert "\n" not in str(refused.value)


def test_an_attention_that_it_does_not_have_is_no_verdict(compared: Compared) -> None:
    with pytest.raises(NoVerdict, match="transformers cannot load it") as refused:
        compared.open(TINY, "transformers", {"attn_implementation": "sideways"})
    assert "\n" not in str(refused.value)
