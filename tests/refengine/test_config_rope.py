"""What a config.json may say about rotary embedding, in every spelling, and what is refused by name."""

from typing import Any

import pytest

from refengine.config import Config
from tests.checkpoints import TINY
from tests.refengine.config_files import LLAMA3, ROPES, YARN, refused, without


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_every_spelling_of_a_rope_type_gives_the_same_parameters(rope: dict[str, Any]) -> None:
    legacy = without(rope, "rope_type") | {"type": rope["rope_type"]}
    spellings = [
        {"rope_scaling": rope},
        {"rope_scaling": legacy},
        {"rope_parameters": rope},
        {"rope_theta": None, "rope_parameters": rope | {"rope_theta": 10000.0}},
        {"rope_parameters": rope | {"rope_theta": 10000}},  # both, and the same
    ]
    found = {Config.from_dict(TINY | spelling).rope_parameters for spelling in spellings}
    assert len(found) == 1
    (parameters,) = found
    assert (parameters.rope_theta, {key: getattr(parameters, key) for key in rope}) == (10000.0, rope)


@pytest.mark.parametrize("nested", ["rope_parameters", "rope_scaling"])
def test_two_values_of_rope_theta_are_refused_with_both(nested: str) -> None:
    text = refused(TINY | {nested: {"rope_type": "default", "rope_theta": 500000.0}})
    assert text.startswith("rope_theta")
    assert "10000.0" in text
    assert "500000.0" in text


def test_a_missing_rope_theta_is_never_a_default() -> None:
    text = refused(without(TINY, "rope_theta") | {"rope_parameters": {"rope_type": "default"}})
    assert text.startswith("rope_theta")
    assert "none" in text


@pytest.mark.parametrize("rope_type", ["longrope", "su", "mrope", "ntk", 3, ["linear"]], ids=str)
def test_an_unknown_rope_type_is_refused_with_those_that_are_known(rope_type: Any) -> None:
    text = refused(TINY | {"rope_scaling": {"rope_type": rope_type, "factor": 2.0}})
    assert repr(rope_type) in text
    assert "llama3" in text


@pytest.mark.parametrize(
    ("rope", "key"),
    [(rope, key) for rope in ROPES for key in without(rope, "rope_type")],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("value", ["absent", None, 0, -2.0, "2"], ids=str)
def test_a_rope_setting_that_is_missing_or_out_of_range_is_named(rope: dict[str, Any], key: str, value: Any) -> None:
    changed = without(rope, key) if value == "absent" else rope | {key: value}
    assert key in refused(TINY | {"rope_parameters": changed})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": YARN | {"attention_factor": -1.0}}, "attention_factor"),
        ({"rope_parameters": YARN | {"beta_fast": "32"}}, "beta_fast"),
        ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim"),
        ({"rope_parameters": YARN, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 5.0}}, "rope_scaling"),
        (
            {"rope_parameters": YARN, "original_max_position_embeddings": 32},
            "original_max_position_embeddings",
        ),
        (
            {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"layer_types": 3}, "layer_types"),
        ({"layer_types": [["full_attention"]]}, "layer_types"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_setting_that_contradicts_another_or_divides_by_zero_is_named(change: dict[str, Any], key: str) -> None:
    assert key in refused(TINY | change)
