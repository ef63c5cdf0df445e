"""Decoders that are two graphs, one for prompts and one for what comes later: each pass is looked at in its own."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, helper, numpy_helper

from refengine.checkpoint import open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.verify.comparing import Compared
from tests.verify.conftest import TEXTS, TINY_LLAMA
from tests.verify.seen import Seen

MODEL = TINY_LLAMA.parent / "tiny_mistral"
LEGACY = TINY_LLAMA.parent / "exports" / "mistral-legacy"
MERGED, FIRST, LATER = (f"decoder_{kind}.onnx" for kind in ("model_merged", "model", "with_past_model"))
LAYER = 2
NODE = f"/model/layers.{LAYER}/mlp/act_fn/Sigmoid"


@pytest.fixture(scope="module")
def compared() -> Compared:
    tokenizer = load_tokenizer(MODEL)
    return Compared(open_checkpoint(MODEL), [encode_prompt(tokenizer, TEXTS[1], chat=False)[:12]], 3)


def plant(graph: GraphProto, name: str = NODE) -> None:
    """Makes the result of one node a hundredth larger."""
    place, node = next((place, node) for place, node in enumerate(graph.node) if node.name == name)
    given = node.output[0]
    node.output[0] = "inside"
    graph.initializer.append(numpy_helper.from_array(np.array(1.01, np.float32), "factor"))
    graph.node.insert(place + 1, helper.make_node("Mul", ["inside", "factor"], [given], name="planted"))


def two_files(directory: Path, *faulty: str) -> Path:
    """A decoder of two files, of which some are faulty."""
    for name in (FIRST, LATER, "config.json"):
        shutil.copy(LEGACY / name, directory / name)
    for name in faulty:
        model = onnx.load(LEGACY / name)
        plant(model.graph)
        onnx.save(model, directory / name)
    return directory / FIRST


def branches(model: onnx.ModelProto) -> Iterator[tuple[str, GraphProto]]:
    (choice,) = (node for node in model.graph.node if node.op_type == "If")
    return ((attribute.name, attribute.g) for attribute in choice.attribute)


def merged(directory: Path, *faulty: str) -> Path:
    """A decoder with two branches, of which some are faulty."""
    model = onnx.load(LEGACY / MERGED)
    for name, graph in branches(model):
        if name in faulty:
            plant(graph)
    onnx.save(model, directory / MERGED)
    return directory / MERGED


EVERYWHERE = {
    "two files": lambda directory: two_files(directory, FIRST, LATER),
    "two branches": lambda directory: merged(directory, "else_branch", "then_branch"),
}
AFTER_THE_PROMPTS = {
    "two files": lambda directory: two_files(directory, LATER),
    "two branches": lambda directory: merged(directory, "then_branch"),
}


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_a_mistake_in_both_graphs_is_found_in_the_prompts(compared, tmp_path, kind):
    located = Seen(compared, EVERYWHERE[kind](tmp_path)).located()
    assert (located.first.layer, located.first.node, located.layers) == (LAYER, "planted", (LAYER,))
    assert (located.first.phase, located.first.provider) == ("prefill", "CPUExecutionProvider")


@pytest.mark.parametrize("kind", AFTER_THE_PROMPTS)
def test_a_mistake_in_the_later_graph_alone_is_found_in_the_first_step(compared, tmp_path, kind):
    located = Seen(compared, AFTER_THE_PROMPTS[kind](tmp_path)).located()
    assert (located.first.layer, located.first.node, located.layers) == (LAYER, "planted", (LAYER,))
    assert located.first.phase == "decode step 1"


def test_a_mistake_in_the_attention_of_the_later_file_alone_is_found_though_the_first_has_no_past(compared, tmp_path):
    path, later = two_files(tmp_path), onnx.load(LEGACY / LATER)
    plant(later.graph, f"/model/layers.{LAYER}/self_attn/Softmax")
    onnx.save(later, tmp_path / LATER)
    first = Seen(compared, path).located().first
    assert (first.untraced, first.point, first.node, first.phase) == (
        *(None, "self_attn.attend", "planted"),
        "decode step 1",
    )


@pytest.mark.parametrize("path", [FIRST, MERGED])
def test_nothing_is_found_where_both_graphs_are_right(compared, path):
    located = Seen(compared, LEGACY / path).located()
    assert (located.first, located.notes) == (None, ("no part of the model is wrong by itself",))


def test_a_branch_that_is_chosen_by_something_else_is_said_not_to_be_looked_into(compared, tmp_path):
    model = onnx.load(merged(tmp_path, "else_branch", "then_branch"))
    (choice,) = model.graph.node
    choice.input[0] = "chosen"
    model.graph.node.insert(0, helper.make_node("Not", ["use_cache_branch"], ["not_chosen"]))
    model.graph.node.insert(1, helper.make_node("Not", ["not_chosen"], ["chosen"]))
    onnx.save(model, tmp_path / MERGED)
    located = Seen(compared, tmp_path / MERGED).located()
    assert located.notes == ("the residual stream was not found in the graph, which has branches (If)",)
    assert (located.first.layer, located.first.point, located.first.node) == (LAYER + 1, "self_attn.k_cache", None)
