"""The reference against `transformers` in float64, on the golden files that `fixtures/make.py` made."""

import json
import shutil
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.manifest import hashes
from refengine.checkpoint import open_checkpoint
from refengine.generate import generate
from refengine.model import forward
from refengine.weights import Weights

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
RUNS = [(name, run) for name, case in MANIFEST["cases"].items() for run in case["runs"]]
GREEDY = [name for name, case in MANIFEST["cases"].items() if case["greedy_steps"]]
BOUND = 1e-12  # float64 sums in another order differ by 1e-15 here; angles at position 5000 by a few 1e-13

FEATURES = {
    "llama",
    "mistral",
    "multi-head attention",
    "grouped-query attention",
    "multi-query attention",
    "head_dim absent",
    "head_dim given",
    "attention_bias",
    "mlp_bias",
    "tied embeddings",
    "untied embeddings",
    "sliding window",
    "sliding_window null",
    "rope_theta at the top",
    "rope_theta in rope_parameters",
    "rope_scaling with type",
    "rope default",
    "rope linear",
    "rope dynamic",
    "rope llama3",
    "rope yarn",
    "dynamic within max_position_embeddings",
    "dynamic beyond max_position_embeddings",
    "yarn attention_factor derived",
    "yarn attention_factor given",
    "yarn betas",
    "yarn mscale",
    "yarn truncate false",
    "one end token",
    "several end tokens",
    "one file",
    "shards",
    "more than ten layers",
    "F64",
    "F32",
    "F16",
    "BF16",
    "mixed storage",
    "left padding",
    "right padding",
    "far positions",
    "long prompt",
    "greedy",
}


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def opened(directory: Path, resident: bool = True) -> Weights:
    return Weights.open(open_checkpoint(directory), dtype=np.float64, resident=resident)


def relative_error(weights: Weights, name: str, run: str) -> float:
    """max |a - b| / max |b| over the logits of all tokens that are no padding."""
    arrays = golden(name)
    token_ids_BT, positions_BT, expected_BTV = (
        arrays[f"{run}.{what}"] for what in ("token_ids_BT", "positions_BT", "logits_BTV")
    )
    found_BTV = forward(weights, token_ids_BT, positions_BT)
    assert found_BTV.dtype == np.float64
    assert found_BTV.shape == expected_BTV.shape
    kept_BT = positions_BT >= 0
    return float(np.abs(found_BTV - expected_BTV)[kept_BT].max() / np.abs(expected_BTV[kept_BT]).max())


def test_the_golden_files_are_those_of_the_manifest() -> None:
    found = hashes(GOLDEN)
    del found["manifest.json"]
    assert found == MANIFEST["sha256"]


def test_the_golden_cases_cover_every_feature() -> None:
    covered = {feature for case in MANIFEST["cases"].values() for feature in case["covers"]}
    assert covered == FEATURES


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize(("name", "run"), RUNS)
def test_float64_logits_are_those_of_transformers(name: str, run: str, resident: bool) -> None:
    assert relative_error(opened(GOLDEN / name, resident), name, run) <= BOUND


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_greedy_tokens_are_those_of_transformers_up_to_an_end_token(name: str, cache: bool) -> None:
    arrays, weights = golden(name), opened(GOLDEN / name)
    first = next(iter(MANIFEST["cases"][name]["runs"]))
    rows = zip(arrays[f"{first}.token_ids_BT"], arrays[f"{first}.positions_BT"] >= 0, strict=True)
    prompts = [token_ids_T[kept_T].tolist() for token_ids_T, kept_T in rows]
    steps = arrays["greedy_tokens"].shape[1]
    expected = [up_to_an_end(row.tolist(), weights.config.eos_token_id) for row in arrays["greedy_tokens"]]
    assert generate(weights, prompts, steps, cache=cache) == expected


def test_the_golden_rows_of_a_batch_end_at_different_steps_with_different_end_tokens() -> None:
    ends = open_checkpoint(GOLDEN / "llama_grouped_query").config.eos_token_id
    rows = [up_to_an_end(row.tolist(), ends) for row in golden("llama_grouped_query")["greedy_tokens"]]
    assert {row[-1] for row in rows} == set(ends)
    assert len({len(row) for row in rows}) == len(rows)


def up_to_an_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    stops = [step for step, token in enumerate(tokens) if token in ends]
    return tokens[: stops[0] + 1] if stops else tokens


def numbers_that_matter() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each setting in each golden config.json whose change must show in the logits: (case, path of keys)."""
    for name in MANIFEST["cases"]:
        config = read_config(GOLDEN / name)
        yield name, ("rms_norm_eps",)
        for key in ("rope_theta", "sliding_window"):
            if config.get(key) is not None:
                yield name, (key,)
        nested = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
        for key, value in (config[nested] or {}).items():
            if isinstance(value, int | float):
                yield name, (nested, key)
    yield "llama_dynamic", ("max_position_embeddings",)


@pytest.mark.parametrize(
    ("name", "keys"),
    [pytest.param(*each, id="-".join((each[0], *each[1]))) for each in numbers_that_matter()],
)
def test_golden_logits_tell_a_halved_setting(name: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    changed = tmp_path / name
    shutil.copytree(GOLDEN / name, changed)
    config = read_config(GOLDEN / name)
    holder = reduce(getitem, keys[:-1], config)
    holder[keys[-1]] = halved(holder[keys[-1]])
    (changed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = opened(changed)
    assert max(relative_error(weights, name, run) for run in MANIFEST["cases"][name]["runs"]) > 1000 * BOUND


def halved(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    return value // 2 if isinstance(value, int) else value / 2
