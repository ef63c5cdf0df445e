"""`python -m refengine cost`: what it prints, in how many columns, and what it refuses."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refengine.__main__ import main
from refengine.config import Config
from refengine.cost import generation_cost
from refengine.cost_table import in_units
from refengine.errors import InputError
from refengine.machine import Machine, measure_machine
from refengine.quant import SCHEMES, UNMEASURED, scheme_named
from refengine.scheme import Scheme, check_scheme, stored_as
from tests.checkpoints import TINY, write_checkpoint

ROOT = Path(__file__).parents[2]
GIVEN = ("--bandwidth", "50", "--flops", "200")
MACHINE = Machine(bandwidth=50e9, flops=200e9)
CONFIG = Config.from_dict(TINY)
EVERY = {**SCHEMES, **UNMEASURED}
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output of a command that succeeds and complains about nothing."""
    assert main(["cost", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def figures(text: str, heading: str) -> list[float]:
    """The numbers of the table's row of that heading."""
    (line,) = re.findall(rf"^{re.escape(heading)}  +(.*)$", text, re.MULTILINE)
    cells = (cell.split() for cell in re.split(r"  +", line.strip()))
    return [float(number) * UNITS["".join(unit)] for number, *unit in cells]


def test_the_table_has_the_figures_of_every_part_in_all_four_passes(checkpoint, capsys):
    text = shown(capsys, checkpoint, "--batch-size", 3, "--sequence-length", 100, "--kv-cache", "float16", *GIVEN)
    cost = generation_cost(CONFIG, 3, 100, SCHEMES["float16"])
    passes = (cost.prefill_cached, cost.prefill_uncached, cost.decode_cached, cost.decode_uncached)
    expected = {part: [getattr(each.flops, part) for each in passes] for part in vars(passes[0].flops)} | {
        "all FLOPs": [each.flops.total for each in passes],
        "weights, B": [each.nbytes.weights for each in passes],
        "cache read, B": [each.nbytes.cache_read for each in passes],
        "cache written, B": [each.nbytes.cache_written for each in passes],
        "between blocks, B": [each.nbytes.activations for each in passes],
        "all bytes moved": [each.nbytes.total for each in passes],
        "least time": [each.seconds(MACHINE) for each in passes],
        "tokens a second": [3 / each.seconds(MACHINE) for each in passes[2:]],
    }
    for heading, values in expected.items():
        assert figures(text, heading) == pytest.approx(values, rel=0.006), heading


def can_store(scheme: Scheme) -> bool:
    try:
        check_scheme(CONFIG, scheme)
    except InputError:
        return False
    return True


def test_every_scheme_that_can_store_the_models_heads_has_its_bytes_and_its_time(checkpoint, capsys):
    text = shown(capsys, checkpoint, "--batch-size", 3, "--sequence-length", 100, *GIVEN)
    assert {name: f"\n{name}  " in text for name in EVERY} == {name: can_store(EVERY[name]) for name in EVERY}
    for name, scheme in EVERY.items():
        if not can_store(scheme):
            continue
        cost = generation_cost(CONFIG, 3, 100, scheme)
        step = cost.decode_cached
        ratio = cost.cache_nbytes / generation_cost(CONFIG, 3, 100).cache_nbytes
        values = [cost.cache_nbytes, ratio, step.nbytes.cache_read, step.seconds(MACHINE), 3 / step.seconds(MACHINE)]
        assert figures(text, name) == pytest.approx(values, rel=0.006), name


def test_words_say_what_the_cache_saves_what_it_does_not_and_how_it_is_counted(checkpoint, capsys):
    text = " ".join(shown(capsys, checkpoint, *GIVEN).split())
    for words in (
        "1 x 128 tokens",  # the model has fewer positions than the default length
        "What the cache saves at token 128",
        "scores of past tokens are not computed again; nor is their MLP",
        "passes between blocks shrinks from the sequence to one token",
        "all weights are read at each step",
        "the whole cache too",
        "50% are computed and then masked",
        "2 x layers 3 x rows 1 x KV heads 2 x tokens 128 x head_dim 10 x 4 bytes",
    ):
        assert words in text


@pytest.mark.parametrize("tokens", [[], ["--sequence-length", "1"]])
def test_in_a_pipe_it_is_plain_text_of_at_most_80_columns_with_nothing_cut(tokens):
    command = [sys.executable, "-m", "refengine", "cost", "fixtures/golden/mistral_window", *GIVEN, *tokens]
    environment = {name: os.environ[name] for name in os.environ.keys() - {"FORCE_COLOR", "COLUMNS"}}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert "window of 5" in done.stdout


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1.000 k"), (12_345, "12.35 k"), (999_949, "999.9 k"), (999_950, "1.000 M")],
)
def test_amounts_have_four_digits_and_a_unit_and_never_a_thousand_of_it(amount, text):
    assert in_units(amount) == text


def test_config_json_alone_is_enough(checkpoint, tmp_path, capsys):
    shutil.copy(checkpoint / "config.json", tmp_path)
    whole, alone = shown(capsys, checkpoint, *GIVEN), shown(capsys, tmp_path, *GIVEN)
    assert whole.splitlines()[1:] == alone.splitlines()[1:]


def test_rates_that_are_not_given_are_measured_and_it_says_so(checkpoint, capsys):
    assert "measured" not in shown(capsys, checkpoint, *GIVEN)
    assert "(FLOP rate measured just now" in shown(capsys, checkpoint, *GIVEN[:2])
    assert "(bandwidth measured just now" in shown(capsys, checkpoint, *GIVEN[2:])


def test_this_machine_reads_and_computes_at_rates_that_machines_have():
    machine = measure_machine()
    assert 1e8 < machine.bandwidth < 1e14
    assert 1e8 < machine.flops < 1e16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "0"], "--batch-size: expected a whole number from 1"),
        (["--batch-size", "-1"], "--batch-size: expected a whole number from 1"),
        (["--batch-size", "two"], "found 'two'"),
        (["--batch-size", "9" * 5000], "--batch-size: expected a whole number from 1"),
        (["--sequence-length", "0"], "--sequence-length: expected a whole number from 1"),
        (["--sequence-length", "1.5"], "found '1.5'"),
        (["--sequence-length", "129"], "expected at most max_position_embeddings 128, found 129"),
        (["--kv-cache", "int3"], "expected one of float64, float32, float16, bfloat16"),
        (["--kv-cache", "int4-g32"], "expected a group size that divides head_dim 10, found 32"),
        (["--bandwidth", "0"], "--bandwidth: expected a number above 0"),
        (["--bandwidth", "-3"], "--bandwidth: expected a number above 0"),
        (["--bandwidth", "inf"], "found 'inf'"),
        (["--flops", "nan"], "--flops: expected a number above 0"),
        (["--flops", "fast"], "found 'fast'"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_one_line_and_nothing_is_printed(checkpoint, capsys, options, words):
    assert main(["cost", str(checkpoint), *GIVEN, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("refengine: ")
    assert words in err
    assert err.count("\n") == 1
    assert len(err) < 160 + len(", ".join(EVERY))


@pytest.mark.parametrize("config", [None, "{}", "no json"])
def test_a_model_that_cannot_be_read_is_refused_in_one_line_that_says_where(tmp_path, capsys, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert main(["cost", str(tmp_path), *GIVEN]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert str(tmp_path) in err
    assert "config.json" in err
    assert err.count("\n") == 1


def test_schemes_are_found_by_name_and_another_name_is_refused_with_the_list() -> None:
    assert all(scheme_named(name) is SCHEMES[name] for name in SCHEMES)
    assert scheme_named("float16") == stored_as(np.float16)
    with pytest.raises(InputError) as refused:
        scheme_named("int3")
    assert all(word in str(refused.value) for word in (*SCHEMES, "'int3'"))
