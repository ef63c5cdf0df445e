"""Caches of codes in a real runtime: what lies on the border between two codes is no fault, and hides none."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from refengine.checkpoint import open_checkpoint
from tests.verify.commands import verify
from tests.verify.comparing import Compared, Here, Notes
from tests.verify.faulty_ir import Edit, edited, with_constant
from verify.compare import Comparison
from verify.expect import Expectation, expectations
from verify.report.result import Cell
from verify.request import Request

FIXTURES = Path(__file__).parents[2] / "fixtures"
IR = FIXTURES / "exports" / "optimum-intel" / "openvino_model.xml"
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
U8, U4 = ({"KV_CACHE_PRECISION": precision} for precision in ("u8", "u4"))
IN_GROUPS_OF_8 = {**U8, "KEY_CACHE_GROUP_SIZE": "8", "VALUE_CACHE_GROUP_SIZE": "8"}
FEW = ("--max-new-tokens", "16", "--batch-size", "4", "--json", "-")
LAYER = "__module.model.layers.5."


def drawn(seed: int) -> tuple[list[list[int]], int]:
    """Some prompts, and how many new tokens."""
    random = np.random.default_rng(seed)
    rows, new_tokens = int(random.integers(1, 9)), int(random.integers(12, 65))
    return [random.integers(0, 384, int(random.integers(1, 80))).tolist() for _ in range(rows)], new_tokens


def cell(
    prompts: list[list[int]],
    new_tokens: int,
    options: Mapping[str, str],
    path: Path = IR,
    expectation: Expectation | None = None,
) -> Cell:
    """The cell with the cache; by default held against what its settings say."""
    checkpoint = open_checkpoint(FIXTURES / "tiny_llama")
    candidate = Compared(checkpoint, prompts, new_tokens).open(path, "openvino", {**F32, **options})
    request = Request(prompts, new_tokens, modes=("on",), expectation=expectation)
    (found,) = Comparison(checkpoint, request, Notes()).cells(Here(candidate))
    return found


# Drawn until a value lay near enough to a border that OpenVINO and float64 took different codes.
ON_BORDERS = {"u8": (102, U8), "u8 in groups of 8": (112, IN_GROUPS_OF_8), "u4": (115, U4)}


@pytest.mark.parametrize("name", ON_BORDERS)
def test_a_value_on_the_border_between_two_codes_may_have_either(name: str) -> None:
    seed, options = ON_BORDERS[name]
    found = cell(*drawn(seed), options)
    assert found.verdict == "equal"
    assert found.tokens is not None
    assert found.noise_ratio is not None
    assert found.tokens.equal == found.tokens.compared
    assert found.noise_ratio.logits < 2  # of float32, not of codes
    assert found.noise_ratio.position_bound < 20


HIDDEN: Mapping[str, Edit] = {
    "eps of the last norm": with_constant("__module.model.norm/aten::add/Add", 1, lambda eps: eps * 0.1),
    "keys": with_constant(f"{LAYER}self_attn.k_proj/aten::linear/MatMul", 1, lambda weight: weight * 1.0001),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_mistake_much_smaller_than_a_step_is_found(name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    prompts = [random.integers(0, 384, int(random.integers(4, 40))).tolist() for _ in range(3)]
    assert cell(prompts, 20, U8, edited(IR, HIDDEN[name], tmp_path)).verdict in ("drift", "mismatch")


@pytest.mark.parametrize(("options", "name"), [(IN_GROUPS_OF_8, "ov-u8"), (U4, "ov-u8")])
def test_codes_of_another_kind_are_found(options: Mapping[str, str], name: str) -> None:
    prompts, _ = drawn(112)
    assert cell(prompts, 12, options, expectation=expectations()[name]).verdict in ("drift", "mismatch")


def test_a_prompt_of_one_token_is_run_by_itself_where_a_first_pass_reads_what_came() -> None:
    prompts = [[5, 17, 44, 80, 3, 9, 121], [7]]
    found = cell(prompts, 12, U8)
    assert (found.verdict, found.batch_size) == ("equal", 1)
    assert cell([prompts[0], [7, 8]], 12, U8).batch_size == 2


def with_rounded_presents(source: Path, dtype: int, ends: str, path: Path) -> Path:
    """What is handed on is rounded; the pass that brings it attends to it as it came."""
    model = onnx.load(source)
    presents = (value.name for value in model.graph.output if value.name.startswith("present"))
    for name in [name for name in presents if name.endswith(ends)]:
        for node in model.graph.node:
            node.output[:] = [f"{name}/whole" if each == name else each for each in node.output]
            node.input[:] = [f"{name}/whole" if each == name else each for each in node.input]
        model.graph.node.append(helper.make_node("Cast", [f"{name}/whole"], [f"{name}/narrow"], to=dtype))
        model.graph.node.append(helper.make_node("Cast", [f"{name}/narrow"], [name], to=TensorProto.FLOAT))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("dtype", "of"), [("FLOAT16", None), ("BFLOAT16", None), ("BFLOAT16", "values")])
def test_a_past_that_is_rounded_is_named_down_to_the_noise(dtype: str, of: str | None, tmp_path: Path) -> None:
    source, ends = IR.parents[1] / "optimum" / "model.onnx", "value" if of else ""
    path = with_rounded_presents(source, TensorProto.DataType.Value(dtype), ends, tmp_path / "model.onnx")
    ran = verify("compare", FIXTURES / "tiny_llama", path, "--runtime", "ort-cpu", "--cache", "on", *FEW)
    report = json.loads(ran.out)
    cause = report["causes"][0]
    assert (report["diagnosis"], cause["name"]) == ("named", "cache-quantized")
    assert cause["parameters"] == {"past": dtype.lower()} | ({"of": of} if of else {})
    assert cause["noise_ratio"]["after"] < 3 < 30 < cause["noise_ratio"]["before"]


def test_a_mistake_much_smaller_than_a_step_is_named_down_to_the_noise(tmp_path: Path) -> None:
    eps = with_constant(f"{LAYER}input_layernorm/aten::add/Add", 1, lambda eps: eps * 0.1)
    settings = [f"--provider-option={key}={value}" for key, value in {**F32, **U8}.items()]
    path = edited(IR, eps, tmp_path)
    ran = verify(
        "compare",
        FIXTURES / "tiny_llama",
        path,
        "--runtime",
        "openvino",
        "--cache",
        "on",
        *settings,
        *FEW,
        "--expect",
        "auto",
    )
    report = json.loads(ran.out)
    cause = report["causes"][0]
    assert (report["diagnosis"], cause["name"], cause["layers"]) == ("named", "norm-eps", [5])
    assert cause["noise_ratio"]["after"] < 3 < 30 < cause["noise_ratio"]["before"]


def test_a_code_that_noise_has_moved_is_not_taken_for_the_place(tmp_path: Path) -> None:
    path = edited(IR, HIDDEN["eps of the last norm"], tmp_path)
    settings = [f"--provider-option={key}={value}" for key, value in {**F32, **U8}.items()]
    asked = ("--runtime", "openvino", "--cache", "on", "--expect", "auto", "--diagnose-seconds", "1")
    many = ("--max-new-tokens", "20", "--json", "-")  # so that a value of a traced row lies on a border
    report = json.loads(verify("compare", FIXTURES / "tiny_llama", path, *asked, *settings, *many).out)
    assert (report["location"]["layer"], report["location"]["point"]) == (None, "norm")
