"""`generate --prompts`: every prompt's text in order whatever the batching, rates and latencies, refusals alone."""

import re
from pathlib import Path

import pytest

from refengine.__main__ import main

MODEL = str(Path(__file__).parents[2] / "fixtures" / "tiny_llama")
SUMMARY = (
    r"\[3 requests, (\d+) tokens, [\d.]+ tokens a second; "
    r"first token after \d+ ms \(median\), \d+ ms \(95th percentile\); "
    r"each further one after \d+ ms \(median\), \d+ ms \(95th percentile\)\]"
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text('The with statement\n{"text": "A class definition"}\n\n{"token_ids": [40, 41]}\n', encoding="utf-8")
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["generate", MODEL, *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("batching", ["static", "dynamic", "continuous"])
def test_texts_come_in_the_order_of_the_prompts_and_are_those_of_each_alone(capsys, prompts, batching):
    more = ("--batch-size", 2, "--max-tokens", 60, "--max-new-tokens", 9)
    code, out, err = run(capsys, "--prompts", prompts, "--batching", batching, *more)
    texts, summary = re.split(r"\n(?=\[\d+ requests)", out.rstrip())
    _, alone, _ = run(capsys, "--prompt", "The with statement", "--max-new-tokens", 9)
    assert (code, err) == (0, "")
    assert [int(number) for number in re.findall(r"^\[(\d)\] ", texts, re.MULTILINE)] == [1, 2, 3]
    assert texts.startswith(f"[1] {alone[: alone.rindex('[')].rstrip()}")
    assert int(re.fullmatch(SUMMARY, summary)[1]) == 27


def test_a_prompt_that_cannot_be_met_is_refused_and_the_others_are_answered(capsys, prompts):
    prompts.write_text('The with\n{"token_ids": [40, 99999]}\nReturn\n', encoding="utf-8")
    code, out, err = run(capsys, "--prompts", prompts, "--max-new-tokens", 3)
    assert (code, err) == (2, "refengine: request 2: expected token ids from 0 to 383, found 99999\n")
    assert re.findall(r"^\[(\d)\] ", out, re.MULTILINE) == ["1", "3"]


def test_limits_that_no_prompt_can_meet_are_refused_in_one_line(capsys, prompts):
    code, out, err = run(capsys, "--prompts", prompts, "--max-tokens", 1)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "max_tokens: expected at least 2" in err


def test_prompts_are_one_or_many(capsys, prompts):
    with pytest.raises(SystemExit) as ended:
        run(capsys, "--prompts", prompts, "--prompt", "one")
    assert ended.value.code == 2
