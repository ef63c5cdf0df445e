"""ONNX exports of every kind that people have, each opened by its path alone and held against its checkpoint."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from refengine.tokens import left_padded
from tests.verify.comparing import Compared
from verify.candidates import Traits
from verify.candidates.ort import OrtCandidate
from verify.interface import CACHE_NAME
from verify.request import Request, not_revealed, notes_on

FIXTURES = Path(__file__).parents[2] / "fixtures"
EXPORTS = FIXTURES / "exports"
LEGACY, COMMUNITY, WINDOWED = (
    EXPORTS / "mistral-legacy",
    EXPORTS / "mistral-community",
    EXPORTS / "mistral-genai-window",
)
RUNTIMES = pytest.mark.parametrize("runtime", ["ort-cpu", "ort-openvino"])
EQUAL = {"off": "equal", "on": "equal"}
LENGTHS, NEW = (29, 20, 11), 4  # tokens of prompts, and after them; the window has 13


@pytest.fixture(scope="session")
def mistral() -> Compared:
    """Prompts longer than the window, and one that reaches it while it is decoded."""
    random = np.random.default_rng(11)
    prompts = [random.integers(2, 384, length).tolist() for length in LENGTHS]
    return Compared(open_checkpoint(FIXTURES / "tiny_mistral"), prompts, NEW)


@pytest.fixture(scope="session")
def llama(compared) -> Compared:
    """English in a ragged batch."""
    return replace(compared, max_new_tokens=NEW)


def verdicts(of: Compared, path: Path, runtime: str, **request) -> dict[str, str]:
    return {mode: cell.verdict for mode, cell in of.cells(path, runtime, **request).items()}


def rewritten(path: Path, to: Path, edit) -> Path:
    """A model after `edit` of its graph, in another file."""
    model = onnx.load(path)
    edit(model.graph)
    onnx.save(model, to)
    return to


@RUNTIMES
@pytest.mark.parametrize(
    ("path", "rows"),
    [
        pytest.param(COMMUNITY, 3, id="optimum's, in an onnx folder"),
        pytest.param(LEGACY, 1, id="a directory with the merged decoder"),
        pytest.param(LEGACY / "decoder_model.onnx", 1, id="a decoder in two files"),
        pytest.param(LEGACY / "decoder_with_past_model.onnx", 1, id="a decoder in two files, by its second"),
        pytest.param(WINDOWED, 1, id="the model builder's, with its window"),
    ],
)
def test_every_kind_is_equal_with_the_cache_and_without(mistral, runtime, path, rows):
    cells = mistral.cells(path, runtime)
    assert {mode: cell.verdict for mode, cell in cells.items()} == EQUAL
    for cell in cells.values():
        assert (cell.tokens.compared, cell.tokens.equal, cell.batch_size) == (3 * NEW, 3 * NEW, rows)
        assert (len(cell.noise_ratio.cache), cell.noise_ratio.cache_beyond) == (2 * 5, ())
    hidden = not_revealed(mistral.checkpoint.config, Request(mistral.prompts, mistral.max_new_tokens), rows > 1)
    assert not any(line.startswith("sliding-window") for line in hidden)


@RUNTIMES
def test_an_export_without_a_past_is_equal_without_the_cache(llama, runtime):
    path = EXPORTS / "optimum-no-past"
    assert verdicts(llama, path, runtime) == {"off": "equal"}
    assert notes_on(llama.open(path, runtime), Request(llama.prompts, NEW)) == [
        f"{runtime}: the export has no past_key_values input, so it was compared without a cache only"
    ]


@RUNTIMES
def test_a_window_that_the_model_builder_left_out_is_found(mistral, runtime):
    """onnxruntime-genai 0.18 writes no window for a Mistral whose config.json has no layer_types, as none has."""
    assert verdicts(mistral, EXPORTS / "mistral-genai", runtime) == {"off": "mismatch", "on": "mismatch"}


def test_the_same_export_is_equal_where_no_prompt_leaves_the_window(mistral):
    short = replace(mistral, prompts=[prompt[:5] for prompt in mistral.prompts])
    assert verdicts(short, EXPORTS / "mistral-genai", "ort-cpu") == EQUAL


def test_padding_is_fed_to_what_is_told_positions_and_the_report_says_of_the_others_that_it_is_not(mistral):
    request = Request(mistral.prompts, mistral.max_new_tokens)
    row_by_row = "ort-cpu: the export cannot be told of left padding, so its prompts were run one by one"
    told = {path: mistral.open(path) for path in (COMMUNITY, LEGACY, LEGACY / "decoder_model.onnx", WINDOWED)}
    assert [candidate.can_pad_left for candidate in told.values()] == [True, False, False, False]
    assert [notes_on(candidate, request) for candidate in told.values()] == [[], *3 * [[row_by_row]]]


@RUNTIMES
@pytest.mark.parametrize(
    ("suffix", "rows"),  # whose inputs share a scale are not fed together
    [("fp16", 3), ("quantized", 1), ("uint8", 1), ("q4", 3), ("q4f16", 3), ("bnb4", 3)],
)
def test_every_precision_of_a_community_folder_is_run_and_its_tokens_are_counted(mistral, runtime, suffix, rows):
    cells = mistral.cells(COMMUNITY / "onnx" / f"model_{suffix}.onnx", runtime)
    assert list(cells) == ["off", "on"]
    for cell in cells.values():
        assert (cell.tokens.compared, cell.batch_size) == (3 * NEW, rows)
        assert cell.verdict in ("drift", "mismatch")  # held against float32
    assert (cells["on"].noise_ratio.logits < 1e4) == (suffix == "fp16")


@RUNTIMES
@pytest.mark.parametrize(("precision", "rows"), [("fp16", 3), ("int4", 1)])
def test_every_precision_of_the_model_builder_is_run_and_its_tokens_are_counted(llama, runtime, precision, rows):
    cells = llama.cells(EXPORTS / f"genai-{precision}", runtime)
    for cell in cells.values():
        assert (cell.tokens.compared, cell.batch_size) == (3 * NEW, rows)
        assert cell.verdict in ("drift", "mismatch")
    assert (cells["on"].noise_ratio.logits < 1e4) == (precision == "fp16")


def test_float16_is_fed_and_given_where_it_is_declared(llama, mistral):
    for of, path in ((llama, EXPORTS / "genai-fp16"), (mistral, COMMUNITY / "onnx" / "model_q4f16.onnx")):
        candidate = of.open(path)
        step = candidate.run(*left_padded([[5, 6, 7]]))
        assert candidate.interface.cache_dtype == "float16"
        assert {array.dtype.name for array in (step.logits_BTV, *step.past.arrays.values())} == {"float16"}


def test_what_had_to_be_switched_off_for_float16_is_among_the_settings(llama, mistral):
    fusion = {"disabled_optimizers": ["SimplifiedLayerNormFusion"]}
    assert mistral.open(COMMUNITY / "onnx" / "model_fp16.onnx").settings.effective["session"] == fusion
    assert llama.open(EXPORTS / "genai-fp16").settings.effective["session"] == {"enable_mem_reuse": False}
    assert mistral.open(COMMUNITY).settings.effective["session"] == {}


def test_a_decoder_in_two_files_says_who_runs_either(mistral):
    effective = mistral.open(LEGACY / "decoder_model.onnx").settings.effective
    nodes = [said["providers"]["CPUExecutionProvider"]["nodes"] for said in (effective, effective["with_past"])]
    assert min(nodes) > 100


def test_a_fault_in_the_second_file_alone_shows_with_the_cache_alone(mistral, tmp_path):
    def scale(graph) -> None:
        head = next(tensor for tensor in graph.initializer if list(tensor.dims) == [60, 384])
        head.raw_data = (numpy_helper.to_array(head) * np.float32(1.001)).tobytes()

    shutil.copy(LEGACY / "decoder_model.onnx", tmp_path)
    rewritten(LEGACY / "decoder_with_past_model.onnx", tmp_path / "decoder_with_past_model.onnx", scale)
    assert verdicts(mistral, tmp_path, "ort-cpu") == {"off": "equal", "on": "drift"}


@pytest.mark.parametrize("path", [COMMUNITY, LEGACY, LEGACY / "decoder_model.onnx", WINDOWED])
def test_what_there_is_to_know_of_a_candidate_can_be_sent_to_another_process(mistral, path):
    traits = Traits.of(mistral.open(path))
    assert pickle.loads(pickle.dumps(traits)) == traits


@RUNTIMES
def test_olives_spelling_of_the_cache_is_understood(mistral, runtime, tmp_path):
    def spell(graph) -> None:
        for info in (*graph.input, *graph.output):
            match = CACHE_NAME.fullmatch(info.name)
            if match is None:
                continue
            name = f"{match[1]}_{match[3]}_{match[2]}"
            for node in graph.node:
                node.input[:] = [name if used == info.name else used for used in node.input]
                node.output[:] = [name if given == info.name else given for given in node.output]
            info.name = name

    path = rewritten(COMMUNITY / "onnx" / "model.onnx", tmp_path / "model.onnx", spell)
    assert ("past_key_4", "present_key_4") in mistral.open(path).interface.carried
    assert verdicts(mistral, path, runtime) == EQUAL


@RUNTIMES
def test_an_export_that_is_told_how_many_logits_to_keep_keeps_all(mistral, runtime, tmp_path):
    def keep(graph) -> None:
        """As transformers.js' exports have it: the last so many, and 0 is all."""
        next(node for node in graph.node if "logits" in node.output).output[0] = "all_logits"
        graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", TensorProto.INT64, []))
        constants = {"far": [np.iinfo(np.int64).max], "token_axis": [1], "in_one": [1]}
        graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in constants.items())
        graph.node.extend(
            [
                helper.make_node("Neg", ["num_logits_to_keep"], ["first"]),
                helper.make_node("Reshape", ["first", "in_one"], ["firsts"]),
                helper.make_node("Slice", ["all_logits", "firsts", "far", "token_axis"], ["logits"]),
            ]
        )

    path = rewritten(COMMUNITY / "onnx" / "model.onnx", tmp_path / "model.onnx", keep)
    assert mistral.open(path, runtime).run(*left_padded([[5, 6, 7]])).logits_BTV.shape == (1, 3, 384)
    assert verdicts(mistral, path, runtime, modes=("on",)) == {"on": "equal"}


@pytest.mark.parametrize("exporter", ["genai", "genai-int4"])
def test_one_buffer_for_past_and_present_changes_no_bit(llama, exporter):
    """onnxruntime-genai shares one, as long as a row may become: what is fed here, the past alone, is as good."""
    candidate = llama.open(EXPORTS / exporter)
    row, longest = llama.prompts[0][:20], 40
    session = ort.InferenceSession(candidate.path, providers=["CPUExecutionProvider"])
    shape = (1, candidate.interface.kv_heads, longest, candidate.interface.head_dim)
    carried, past = candidate.interface.carried, None
    shared = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name, _ in carried}
    for start, stop in ((0, 16), *((at, at + 1) for at in range(16, 20))):
        ids_BT, positions_BT = np.array([row[start:stop]]), np.arange(start, stop)[None]
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids_BT)
        binding.bind_cpu_input("attention_mask", np.ones((1, stop), np.int64))
        for name_in, name_out in carried:
            binding.bind_ortvalue_input(name_in, shared[name_in])
            binding.bind_ortvalue_output(name_out, shared[name_in])
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        step = candidate.run(ids_BT, positions_BT, past)
        past = step.past
        np.testing.assert_array_equal(binding.get_outputs()[-1].numpy(), step.logits_BTV)
        for name, array in past.arrays.items():
            np.testing.assert_array_equal(shared[name].numpy()[:, :, :stop], array)


@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "OpenVINOExecutionProvider"])
def test_any_provider_that_is_installed_runs_by_its_name(mistral, provider):
    runtime = f"ort:{provider}"
    candidate = OrtCandidate.open(COMMUNITY, runtime, {}, mistral.checkpoint.config)
    usual = {"CPUExecutionProvider": "ort-cpu", "OpenVINOExecutionProvider": "ort-openvino"}[provider]
    same = mistral.open(COMMUNITY, usual)
    ids = left_padded([[5, 6, 7], [8]])
    assert candidate.runtime == runtime
    assert candidate.settings.requested == same.settings.requested
    np.testing.assert_array_equal(candidate.run(*ids).logits_BTV, same.run(*ids).logits_BTV)
