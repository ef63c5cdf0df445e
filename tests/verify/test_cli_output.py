"""Where a command writes: to readers who leave, to disks that are full, to links and pipes, to narrow terminals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.verify.commands import environment, verify


@pytest.mark.parametrize("arguments", [["causes"], ["explain", "rope-theta"], ["inspect", None]])
def test_a_reader_who_leaves_early_is_no_failure_of_what_was_shown(small, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "verify", *(argument or str(small.export) for argument in arguments)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment(), check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_and_the_json_is_written_all_the_same(small, tmp_path):
    command = [sys.executable, "-m", "verify", "compare", small.checkpoint, small.export, "--runtime", "ort-cpu"]
    command += [
        "--prompts",
        small.prompts,
        "--max-new-tokens",
        "2",
        "--cache",
        "on",
        "--json",
        tmp_path / "report.json",
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            list(map(str, command)), stdout=full, stderr=subprocess.PIPE, env=environment(), text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "verify: standard output: could not be written (No space left on device); write to another place"
    ]
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "equal"


def test_json_follows_a_link_and_is_written_into_a_pipe_as_it_is(small, tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "latest.json").symlink_to(tmp_path / "reports" / "first.json")
    assert small.compare("--cache", "on", "--json", tmp_path / "latest.json").code == 0
    assert (tmp_path / "latest.json").is_symlink()
    assert json.loads((tmp_path / "reports" / "first.json").read_text())["verdict"] == "equal"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert small.compare("--cache", "on", "--json", tmp_path / "pipe").code == 0
    assert json.loads(os.read(reader, 10**6))["verdict"] == "equal"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("verb", ["compare", "check", "inspect", "export", "bench", "causes", "explain", ""])
def test_help_fits_80_columns(monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    done = verify(*([verb] if verb else []), "--help")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
