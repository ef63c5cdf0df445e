"""What a candidate's own settings explain is named by its causes."""

import json
from pathlib import Path

from tests.verify.commands import verify

FIXTURES = Path(__file__).parents[2] / "fixtures"
PLAIN = ("--provider-option", "INFERENCE_PRECISION_HINT=f32")


def explained(*options: str) -> dict:
    export = FIXTURES / "exports" / "optimum-intel"
    few = ("--max-new-tokens", "6", "--prompt", "The with statement is used to wrap", "--json", "-")
    ran = verify("compare", FIXTURES / "tiny_llama", export, "--runtime", "openvino", *few, *options)
    assert ran.code == 1
    return json.loads(ran.out)


def test_a_coded_cache_that_was_asked_for_is_the_cause_where_the_reference_has_an_exact_one():
    report = explained("--cache", "on", *PLAIN, "--provider-option", "KV_CACHE_PRECISION=u8")
    (cause,) = report["causes"]
    assert (report["diagnosis"], report["location"]["rung"]) == ("named", "cache")
    assert (cause["name"], cause["parameters"], cause["status"]) == (
        "cache-quantized",
        {"scheme": "ov-u8"},
        "confirmed",
    )
    assert cause["noise_ratio"]["after"] < 3 < 30 < cause["noise_ratio"]["before"]


def test_of_several_modes_the_one_whose_settings_say_most_is_told():
    report = explained(
        "--provider-option", "INFERENCE_PRECISION_HINT=bf16", "--provider-option", "KV_CACHE_PRECISION=u8"
    )
    assert [cause["name"] for cause in report["causes"]] == ["arithmetic-bfloat16", "cache-quantized"]
