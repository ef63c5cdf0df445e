"""Runtimes that are libraries of their own, where they are not installed: what is said, and what is refused before."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from refengine.checkpoint import open_checkpoint
from refengine.config import Config
from refengine.errors import InputError
from tests.verify.ggufs import as_gguf
from verify.candidates.files import describe_candidate
from verify.errors import NoVerdict, RuntimeMissing
from verify.files import sha256_of
from verify.runtimes import RUNTIMES

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = FIXTURES / "tiny_llama"
GENAI = FIXTURES / "exports" / "genai"
PACKAGES = {"genai": "onnxruntime_genai", "transformers": "torch", "llama.cpp": "llama_cpp"}


@pytest.fixture(scope="module")
def config() -> Config:
    return open_checkpoint(TINY).config


@pytest.fixture(scope="module")
def of_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_gguf(open_checkpoint(TINY), tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture
def paths(of_gguf: Path) -> dict[str, Path]:
    return {"genai": GENAI, "transformers": TINY, "llama.cpp": of_gguf}


@pytest.mark.parametrize("runtime", PACKAGES)
def test_a_missing_package_is_no_verdict_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, paths: dict[str, Path], config: Config, runtime: str
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[runtime], None)  # as if it were not there
    with pytest.raises(RuntimeMissing, match=r'cannot be imported .*: pip install "tokenproof\[') as refused:
        RUNTIMES[runtime](paths[runtime], runtime, {}, config)
    assert str(refused.value).startswith(f"{runtime}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("runtime", "options", "words"),
    [
        ("genai", {"n_ctx": "9"}, "genai has max_length, found 'n_ctx'"),
        ("genai", {"max_length": "many"}, "expected max_length as a whole number above 0, found 'many'"),
        ("transformers", {"max_length": "9"}, "transformers has dtype, attn_implementation, found 'max_length'"),
        ("transformers", {"dtype": "int8"}, "expected dtype as float32, float16, bfloat16, found 'int8'"),
        ("llama.cpp", {"n_gpu_layers": "9"}, "llama.cpp has n_ctx, .*, found 'n_gpu_layers'"),
        ("llama.cpp", {"type_k": "q3"}, "expected type_k as one of f32, f16, q8_0, .*, found 'q3'"),
        ("llama.cpp", {"flash_attn": "on"}, "expected flash_attn as one of true, false, found 'on'"),
        ("llama.cpp", {"n_ctx": "0"}, "expected n_ctx as a whole number above 0, found '0'"),
    ],
)
def test_an_option_that_it_does_not_have_is_no_verdict(
    paths: dict[str, Path], config: Config, runtime: str, options: dict[str, str], words: str
) -> None:
    with pytest.raises(NoVerdict, match=words):
        RUNTIMES[runtime](paths[runtime], runtime, options, config)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ("genai", "genai_config.json: no such file; expected a directory of onnxruntime-genai's model builder"),
        ("transformers", "expected a checkpoint directory"),
        ("llama.cpp", r"expected a \.gguf file"),
    ],
)
def test_an_onnx_file_alone_is_refused(config: Config, runtime: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        RUNTIMES[runtime](FIXTURES / "exports" / "dynamo" / "model.onnx", runtime, {}, config)


def test_a_genai_directory_without_its_model_is_refused(tmp_path: Path, config: Config) -> None:
    shutil.copy(GENAI / "genai_config.json", tmp_path)
    with pytest.raises(InputError, match=r"model\.onnx: no such file, although genai_config\.json names it"):
        RUNTIMES["genai"](tmp_path, "genai", {}, config)


def test_another_file_than_the_one_that_the_genai_directory_names_is_refused(tmp_path: Path, config: Config) -> None:
    shutil.copytree(GENAI, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "model.onnx", tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"other\.onnx: expected model\.onnx, .*genai_config\.json beside it names"):
        RUNTIMES["genai"](tmp_path / "other.onnx", "genai", {}, config)


@pytest.mark.parametrize("damage", ["{", "[]", '{"model": {"decoder": {}}, "search": {}}'])
def test_a_genai_directory_that_does_not_describe_its_model_is_refused(
    tmp_path: Path, config: Config, damage: str
) -> None:
    shutil.copytree(GENAI, tmp_path, dirs_exist_ok=True)
    (tmp_path / "genai_config.json").write_text(damage)
    with pytest.raises(InputError, match=r"genai_config\.json: ") as refused:
        RUNTIMES["genai"](tmp_path, "genai", {}, config)
    assert "\n" not in str(refused.value)


def test_a_genai_directory_of_another_model_is_refused(tmp_path: Path, config: Config) -> None:
    shutil.copytree(GENAI, tmp_path, dirs_exist_ok=True)
    said = json.loads((tmp_path / "genai_config.json").read_text())
    said["model"]["decoder"]["num_key_value_heads"] = 3
    (tmp_path / "genai_config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="candidate has 3 KV heads, checkpoint 2"):
        RUNTIMES["genai"](tmp_path, "genai", {}, config)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, config: Config) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"something else")
    with pytest.raises(InputError, match="not a GGUF file"):
        RUNTIMES["llama.cpp"](file, "llama.cpp", {}, config)
    with pytest.raises(InputError, match="not a whole GGUF file"):
        describe_candidate(file)


def test_a_checkpoint_is_described_by_the_fingerprint_that_it_has_as_the_model(of_gguf: Path) -> None:
    for path, exporter in ((TINY, "checkpoint of transformers 5.23.0"), (of_gguf, "GGUF, F32")):
        found = describe_candidate(path)
        assert (found.path, found.exporter) == (path, exporter)
        assert found.sha256 == sha256_of(*open_checkpoint(path).files)


def test_of_a_directory_with_both_the_runtime_decides_what_is_described(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "onnx").mkdir()
    shutil.copy(GENAI / "model.onnx", tmp_path / "onnx")
    assert describe_candidate(tmp_path).path == tmp_path / "onnx" / "model.onnx"
    assert describe_candidate(tmp_path, "transformers").path == tmp_path


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        describe_candidate(tmp_path)
