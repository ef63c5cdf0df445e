"""Prompts from a file: text or JSON, one a line; and what is refused before anything runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refengine.config import Config
from refengine.errors import InputError, TokensError
from refengine.prompts import encode_checked, read_prompts
from refengine.tokenizer import encode_prompt, load_tokenizer
from tests.checkpoints import TINY
from tests.verify.commands import verify
from verify.prompts import BUILT_IN, check_prompts, probes

CONFIG = Config.from_dict(TINY)


def code_points(text: str) -> list[int]:
    """A tokenizer that loses nothing."""
    return [ord(character) for character in text]


def read(directory: Path, content: str | bytes) -> list[list[int]]:
    file = directory / "prompts"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(file, code_points)


def test_each_line_of_text_is_a_prompt_as_it_stands(tmp_path):
    assert read(tmp_path, "first one\n  second \t\n3") == list(map(code_points, ("first one", "  second \t", "3")))


def test_json_lines_give_text_or_token_ids_and_mix_with_plain_lines(tmp_path):
    lines = '{"text": "a\\nb"}\n{"token_ids": [5, 0, 66], "name": "x"}\nplain\n  {"text": "c"}\n'
    assert read(tmp_path, lines) == [code_points("a\nb"), [5, 0, 66], code_points("plain"), code_points("c")]


def test_blank_lines_are_passed_over_and_lines_are_counted_with_them(tmp_path):
    assert read(tmp_path, "\n\n one\n \t \ntwo\n\n") == [code_points(" one"), code_points("two")]
    with pytest.raises(InputError, match=r"prompts:4: begins like JSON"):
        read(tmp_path, "\none\n \n{\n")


def test_line_ends_and_byte_order_marks_of_other_systems_are_no_text(tmp_path):
    content = b'\xef\xbb\xbf{"token_ids": [7]}\r\ntext\r\n'
    assert read(tmp_path, content) == [[7], code_points("text")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
@pytest.mark.parametrize("ascii_only", [True, False])
def test_any_text_comes_through_json_lines(tmp_path, texts, ascii_only):
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts)
    assert read(tmp_path, lines) == list(map(code_points, texts))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"prompts: expected a prompt a line, found none"),
        (" \n\t\n", r"prompts: expected a prompt a line, found none"),
        ('{"text": "a"', r"prompts:1: begins like JSON but is not \("),
        ('ok\n{"text": }', r"prompts:2: begins like JSON but is not \("),
        ("{'text': 'a'}", r"prompts:1: begins like JSON but is not \("),
        ('{"a": ' + 100_000 * "[", r"prompts:1: begins like JSON but is not \("),
        (
            '{"prompt": "a", "b": 1}',
            r"""prompts:1: expected "text" .* or "token_ids" .*, found keys \['b', 'prompt'\]""",
        ),
        ('{"text": 5}', r"""prompts:1: expected "text" \(a string\)"""),
        ('{"token_ids": "5"}', r"prompts:1: expected"),
        ('{"token_ids": [5, 1.0]}', r"prompts:1: expected .*whole numbers"),
        ('{"token_ids": [true]}', r"prompts:1: expected .*whole numbers"),
        ('{"token_ids": {"5": 5}}', r"prompts:1: expected .*whole numbers"),
        ('{"text": "\\ud83d"}', r"prompts:1: expected text, found half a surrogate pair"),
        (b"caf\xe9\n", r"prompts: prompts could not be read \(.*utf-8"),
    ],
)
def test_a_line_that_gives_no_prompt_is_refused_in_one_line_that_names_it(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_is_not_there_or_a_directory_is_refused(tmp_path):
    for place in (tmp_path / "gone", tmp_path):
        with pytest.raises(InputError, match="prompts could not be read"):
            read_prompts(place, code_points)


def test_half_a_surrogate_pair_on_the_command_line_is_refused():
    with pytest.raises(InputError, match="--prompt: expected text"):
        encode_checked("--prompt", "caf\udce9", code_points)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 2: expected at least one token, found none"),
        ([[1], [2, 67]], "prompt 2: expected token ids from 0 to 66, found 67"),
        ([[-1]], "prompt 1: expected token ids from 0 to 66, found -1"),
        ([[10**30]], "prompt 1: expected token ids from 0 to 66, found 10"),
        ([[1] * 120, [1] * 121], "prompt 2: 121 tokens and 8 new ones exceed max_position_embeddings 128; shorten it"),
    ],
)
def test_prompts_that_the_model_cannot_be_fed_are_refused_by_number(prompts, message):
    with pytest.raises(TokensError, match=message):
        check_prompts(prompts, CONFIG, 8)


def test_ids_at_either_end_and_a_prompt_that_just_fits_are_accepted():
    check_prompts([[0, 66], [1] * 120], CONFIG, 8)


def test_the_built_in_prompts_are_ragged_and_fit_the_embedded_model(tiny):
    tokenizer = load_tokenizer(tiny.path)
    prompts = [encode_prompt(tokenizer, text, chat=False) for text in BUILT_IN]
    check_prompts(prompts, tiny.config, 64)
    lengths = sorted(map(len, prompts))
    assert len(set(lengths)) == len(lengths) == 8
    assert lengths[0] < 8
    assert lengths[-1] > 100


def test_probes_are_ragged_and_go_beyond_the_window_and_fit_the_model(tiny):
    windowed = replace(tiny.config, sliding_window=70)
    for config in (tiny.config, windowed):
        long, short = probes(config, 16)
        check_prompts([long, short], config, 16)
        assert len(short) < len(long)
        assert len(long) > (config.sliding_window or 0)
    assert probes(windowed, 16) == probes(windowed, 16)


def test_a_window_that_a_short_prompt_hides_is_shown_by_a_probe(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"token_ids": [5, 6, 7]}\n', encoding="utf-8")
    fixtures = Path(__file__).parents[2] / "fixtures"
    asked = ("compare", fixtures / "tiny_mistral", fixtures / "exports" / "mistral-genai", "--runtime", "ort-cpu")
    quick = ("--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 2, "--cache", "off")
    hidden, shown = verify(*asked, *quick), verify(*asked, *quick, "--probe")
    assert hidden.first_lines[0].startswith("equal")
    assert "not revealed: sliding-window" in hidden.out
    assert shown.first_lines[1].startswith("cause: sliding-window (window none)")
