"""Damage done to a small model's files, and what must be said of each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import load_file, save_file

from refengine.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.verify.commands import Small
from verify.export import export_decoder


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensor(copy: Small, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors = load_file(copy.checkpoint / "model.safetensors")
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, copy.checkpoint / "model.safetensors")


def into_shards(copy: Small) -> Path:
    """Splits the weights into two files with an index; returns the index."""
    tensors = load_file(copy.checkpoint / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, copy.checkpoint / file)
    (copy.checkpoint / "model.safetensors").unlink()
    index = copy.checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, inside in parts.items() for name in inside}}))
    return index


def no_such_checkpoint(copy: Small) -> list[str]:
    shutil.rmtree(copy.checkpoint)
    return [str(copy.checkpoint), "no such file or directory"]


def not_a_checkpoint(copy: Small) -> list[str]:
    (copy.checkpoint / "config.json").unlink()
    return ["no config.json; expected a Hugging Face checkpoint directory"]


def not_a_config(copy: Small) -> list[str]:
    (copy.checkpoint / "config.json").write_text("{")
    return ["config.json: not readable as JSON"]


def another_family(copy: Small) -> list[str]:
    change_json(copy.checkpoint / "config.json", model_type="gemma2")
    return ["config.json: model_type: expected one of llama, mistral, found 'gemma2'"]


def missing_shard(copy: Small) -> list[str]:
    into_shards(copy)
    (copy.checkpoint / "model-2-of-2.safetensors").unlink()
    return ["model-2-of-2.safetensors: no such file; the checkpoint is incomplete"]


def shard_outside(copy: Small) -> list[str]:
    index = into_shards(copy)
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=weight_map | {"lm_head.weight": "../outside.safetensors"})
    return ["names the file '../outside.safetensors', which leaves the checkpoint's directory"]


def missing_tensor(copy: Small) -> list[str]:
    tensors = load_file(copy.checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy.checkpoint / "model.safetensors")
    return ["no tensor 'model.layers.1.mlp.up_proj.weight'"]


def wrong_shape(copy: Small) -> list[str]:
    change_tensor(copy, "model.layers.1.mlp.up_proj.weight", lambda weight_FD: weight_FD[:, 1:])
    return ["model.layers.1.mlp.up_proj.weight: expected shape (56, 40) from config.json, found (56, 39)"]


def truncated_weights(copy: Small) -> list[str]:
    file = copy.checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return ["model.safetensors: not a whole safetensors file"]


def lying_header(copy: Small) -> list[str]:
    file = copy.checkpoint / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])
    return ["model.safetensors: not a whole safetensors file"]


def pickled_weights(copy: Small) -> list[str]:
    (copy.checkpoint / "model.safetensors").rename(copy.checkpoint / "pytorch_model.bin")
    return ["pytorch_model.bin: pickled weights are never loaded"]


def weights_that_are_nan(copy: Small) -> list[str]:
    change_tensor(copy, "model.layers.2.self_attn.k_proj.weight", lambda weight: weight * np.nan)
    return ["model.layers.2.self_attn.k_proj.weight: expected finite weights, found 800 NaN or infinite"]


def no_such_candidate(copy: Small) -> list[str]:
    copy.export.unlink()
    return ["model.onnx: no such file or directory"]


def candidate_of_another_kind(copy: Small) -> list[str]:
    copy.export.write_text("version https://git-lfs.github.com/spec/v1\n")
    return ["model.onnx: not a whole ONNX file"]


def truncated_candidate(copy: Small) -> list[str]:
    copy.export.write_bytes(copy.export.read_bytes()[:-100])
    return ["model.onnx: not a whole ONNX file"]


def external_data_outside(copy: Small) -> list[str]:
    model = onnx.load(copy.export)
    onnx.save(model, copy.export, save_as_external_data=True, location="weights.data", size_threshold=0)
    model = onnx.load(copy.export, load_external_data=False)
    location = next(
        entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    )
    location.value = "../weights.data"
    onnx.save(model, copy.export)
    return ["'../weights.data', which leaves the model's directory"]


def export_of_another_model(copy: Small) -> list[str]:
    other = write_checkpoint(copy.directory / "other", num_hidden_layers=4, vocab_size=68, num_key_value_heads=3)
    export_decoder(open_checkpoint(other), copy.export)
    shutil.rmtree(other)
    return [
        "candidate has 4 layers, checkpoint 3",
        "candidate has 3 KV heads, checkpoint 2",
        "candidate has 68 tokens in its vocabulary, checkpoint 67",
        "the export is of another model",
    ]


def past_of_query_heads(copy: Small) -> list[str]:
    other = write_checkpoint(copy.directory / "other", num_key_value_heads=6)
    export_decoder(open_checkpoint(other), copy.export)
    shutil.rmtree(other)
    return ["candidate has 6 KV heads, checkpoint 2: its past was built with num_attention_heads"]


def not_a_decoder(copy: Small) -> list[str]:
    model = onnx.load(copy.export)
    next(value for value in model.graph.input if value.name == "input_ids").name = "pixels"
    onnx.save(model, copy.export)
    return ["pixels: this input is not known"]


def empty_prompt(copy: Small) -> list[str]:
    copy.prompts.write_text('{"token_ids": [1]}\n{"token_ids": []}\n')
    return ["prompt 2: expected at least one token, found none"]


def token_out_of_range(copy: Small) -> list[str]:
    copy.prompts.write_text('{"token_ids": [1, 67]}\n')
    return ["prompt 1: expected token ids from 0 to 66, found 67"]


def prompt_too_long(copy: Small) -> list[str]:
    copy.prompts.write_text(json.dumps({"token_ids": [1] * 125}))
    return ["prompt 1: 125 tokens and 4 new ones exceed max_position_embeddings 128"]


def no_prompts(copy: Small) -> list[str]:
    copy.prompts.write_text("\n")
    return ["prompts.jsonl: expected a prompt a line, found none"]


def text_without_a_tokenizer(copy: Small) -> list[str]:
    copy.prompts.write_text("Hello\n")
    return ["checkpoint: no tokenizer.json"]


BAD = [
    no_such_checkpoint,
    not_a_checkpoint,
    not_a_config,
    another_family,
    missing_shard,
    shard_outside,
    missing_tensor,
    wrong_shape,
    truncated_weights,
    lying_header,
    pickled_weights,
    weights_that_are_nan,
    no_such_candidate,
    candidate_of_another_kind,
    truncated_candidate,
    external_data_outside,
    export_of_another_model,
    past_of_query_heads,
    not_a_decoder,
    empty_prompt,
    token_out_of_range,
    prompt_too_long,
    no_prompts,
    text_without_a_tokenizer,
]
