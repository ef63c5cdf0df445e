"""ONNX files that are refused before anything is done with them."""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from tests.checkpoints import write_checkpoint
from verify.candidates.onnx_file import describe, find_onnx
from verify.errors import RuntimeMissing
from verify.export import export_decoder
from verify.inspection import inspect

Q4 = Path(__file__).parents[2] / "fixtures" / "exports" / "mistral-community" / "onnx" / "model_q4.onnx"
OUTSIDE = [
    "/etc/passwd",
    "../outside.data",
    "folder/../../outside.data",
    "C:\\outside.data",
    "C:outside.data",
    "..\\outside.data",
    "\\\\host\\share",
    "\\outside.data",
    "",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> onnx.ModelProto:
    directory = tmp_path_factory.mktemp("export")
    export_decoder(open_checkpoint(write_checkpoint(directory / "checkpoint")), directory / "model.onnx")
    return onnx.load(directory / "model.onnx")


@pytest.fixture
def external(whole, tmp_path) -> Path:
    """An export with its weights in a file beside it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(whole)
    path = tmp_path / "model.onnx"
    onnx.save(copy, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    return path


def rewrite(path: Path, key: str, value: str) -> str:
    """Changes one entry of the first external tensor's description; returns the tensor's name."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    entries = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for name, text in entries.items():
        tensor.external_data.add(key=name, value=text)
    onnx.save(model, path)
    return tensor.name


def test_what_is_no_onnx_file_is_refused(tmp_path):
    (tmp_path / "model.xml").write_text("<net/>")
    places = {"gone.onnx": "no such file", "model.xml": "expected an .onnx file", "": "no model.onnx"}
    for name, message in places.items():
        with pytest.raises(InputError, match=message):
            describe(tmp_path / name)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize("content", [b"", b"\x00garbage" * 9, LFS_POINTER])
def test_a_file_that_holds_no_model_is_refused(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx: (not a whole ONNX file|expected an ONNX model)"):
        describe(tmp_path / "model.onnx")


def test_a_truncated_file_is_refused(whole, tmp_path):
    content = whole.SerializeToString()
    (tmp_path / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"model\.onnx: not a whole ONNX file"):
        describe(tmp_path / "model.onnx")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_gives_one_line_that_names_a_file(external, data):
    content = bytearray(external.read_bytes())  # without the weights, so that damage falls on the graph
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    damaged = external.parent / "damaged.onnx"
    damaged.write_bytes(content)
    try:
        inspect(damaged)
    except InputError as error:
        line = str(error)
    else:
        line = str(damaged)
    assert line.startswith(str(external.parent))


def test_names_that_are_no_text_are_refused(external):
    content = external.read_bytes()
    external.write_bytes(content.replace(b"Softmax", b"Soft\xff\xfex", 1))
    with pytest.raises(InputError, match="expected names in UTF-8, found b'/model/layers"):
        describe(external)


def test_an_element_type_that_nobody_knows_is_refused(external):
    model = onnx.load(external, load_external_data=False)
    model.graph.initializer[0].data_type = 99
    onnx.save(model, external)
    with pytest.raises(InputError, match="expected a tensor of a known type, found type 99"):
        describe(external)


@pytest.mark.parametrize("location", OUTSIDE)
def test_external_data_outside_the_directory_are_refused(external, location):
    name = rewrite(external, "location", location)
    with pytest.raises(InputError, match="leaves the model's directory") as caught:
        describe(external)
    assert name in str(caught.value)


def test_external_data_that_are_missing_are_named(external):
    (external.parent / "weights.data").unlink()
    with pytest.raises(InputError, match=r"weights\.data: no such file, although model\.onnx keeps"):
        describe(external)


def test_external_data_that_are_cut_short_are_named(external):
    data = external.parent / "weights.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"weights\.data: expected at least .* cut short"):
        describe(external)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offset", "-8"),
        ("offset", "many"),
        ("length", "3"),
        ("length", "99999999"),
        ("offset", "99999999"),
    ],
)
def test_external_data_that_are_described_wrongly_are_refused(external, key, value):
    rewrite(external, key, value)
    with pytest.raises(InputError, match=r"external data of|cut short"):
        describe(external)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model": {"decoder": {"filename": "gone.onnx"}}}', r"gone\.onnx: no such file, although genai_config"),
        ('{"model": {"decoder": {"filename": "../model.onnx"}}}', "leaves the model's directory"),
        ('{"model": {"decoder": {"filename": 3}}}', "leaves the model's directory"),
        ('{"model": []}', r"expected model\.decoder\.filename"),
        ("{", r"expected model\.decoder\.filename"),
    ],
)
def test_a_genai_config_that_names_no_usable_file_is_refused(tmp_path, config, message):
    (tmp_path / "genai_config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        find_onnx(tmp_path)


COMMUNITY = ("onnx/model_fp16.onnx", "onnx/model_q4.onnx", "onnx/model_q4f16.onnx")


def touched(directory: Path, names: Iterable[str]) -> Path:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).touch()
    return directory


def test_a_directory_with_several_models_asks_for_one(tmp_path):
    with pytest.raises(
        InputError, match=r"found onnx/model_fp16\.onnx, onnx/model_q4\.onnx, onnx/model_q4f16.* and no"
    ):
        find_onnx(touched(tmp_path, COMMUNITY))


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (COMMUNITY[:1], COMMUNITY[0]),
        ((*COMMUNITY, "onnx/model.onnx"), "onnx/model.onnx"),
        (("onnx/model.onnx", "model.onnx"), "model.onnx"),
        (("decoder_model.onnx", "decoder_with_past_model.onnx"), "decoder_model.onnx"),
        (
            ("decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx"),
            "decoder_model_merged.onnx",
        ),
        (
            ("onnx/decoder_model_merged.onnx", "onnx/decoder_model_merged_quantized.onnx"),
            "onnx/decoder_model_merged.onnx",
        ),
        (("decoder_model_int8.onnx", "decoder_with_past_model_int8.onnx"), "decoder_model_int8.onnx"),
    ],
)
def test_a_directory_means_the_whole_model_and_a_path_the_file_there(tmp_path, names, meant):
    assert find_onnx(touched(tmp_path, names)) == tmp_path / meant
    for name in names:
        assert find_onnx(tmp_path / name).name == name.replace("_with_past", "").rpartition("/")[2]


def test_the_second_half_of_a_decoder_is_nothing_without_the_first(tmp_path):
    touched(tmp_path, ["decoder_with_past_model.onnx"])
    for path in (tmp_path, tmp_path / "decoder_with_past_model.onnx"):
        with pytest.raises(InputError, match=r"decoder_model\.onnx: no such file, although decoder_with_past_model"):
            find_onnx(path)


def test_the_first_half_of_a_decoder_alone_is_an_export_without_a_past(whole, tmp_path):
    onnx.save(whole, tmp_path / "decoder_model.onnx")
    alone = describe(tmp_path)
    assert alone.with_past is None
    onnx.save(whole, tmp_path / "decoder_with_past_model.onnx")
    both = describe(tmp_path)
    assert (both.path, both.with_past.path.name) == (alone.path, "decoder_with_past_model.onnx")
    assert both.sha256 != alone.sha256


def test_a_half_that_is_cut_short_is_named(whole, tmp_path):
    onnx.save(whole, tmp_path / "decoder_model.onnx")
    (tmp_path / "decoder_with_past_model.onnx").write_bytes(whole.SerializeToString()[:-100])
    with pytest.raises(InputError, match=r"decoder_with_past_model\.onnx: not a whole ONNX file"):
        describe(tmp_path)


@pytest.fixture
def in_two_files(tmp_path) -> Path:
    """A four-bit model whose weights are shared out as onnx-community shares out large ones."""
    path = tmp_path / "model_q4.onnx"
    onnx.save(onnx.load(Q4), path, save_as_external_data=True, location="model_q4.onnx_data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    moved = [tensor for tensor in model.graph.initializer if tensor.external_data][1::2]
    for tensor in moved:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "model_q4.onnx_data_1"
    onnx.save(model, path)
    shutil.copyfile(tmp_path / "model_q4.onnx_data", tmp_path / "model_q4.onnx_data_1")
    return path


def test_weights_in_several_files_are_all_found(in_two_files):
    names = ["model_q4.onnx_data", "model_q4.onnx_data_1"]
    assert [file.name for file in describe(in_two_files).external_files] == names


@pytest.mark.parametrize("name", ["model_q4.onnx_data", "model_q4.onnx_data_1"])
def test_four_bit_weights_that_are_cut_short_are_named(in_two_files, name):
    data = in_two_files.with_name(name)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"{name}: expected at least \d+ bytes, .* cut short"):
        describe(in_two_files)


def test_without_the_onnx_package_the_extra_to_install_is_named(external, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not there
    with pytest.raises(RuntimeMissing, match=r'pip install "tokenproof\[onnxruntime\]"$'):
        describe(external)
