"""The README's commands run as they stand; its first two, which set up from nothing, are run by `.ci/run`."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like a clone, and where commands may leave files."""
    directory = tmp_path_factory.mktemp("clone")
    for name in ("refengine", "verify", "fixtures"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def run(arguments: list[str], clone: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(clone)}
    return subprocess.run(arguments, cwd=clone, env=environment, capture_output=True, text=True, check=False)


def test_the_first_screen_has_two_commands_that_set_up_from_nothing() -> None:
    setups = [command for command in COMMANDS if command.startswith("python3 -m venv")]
    assert COMMANDS[:2] == setups
    assert setups[0].endswith("-m verify compare")
    assert setups[1].endswith("-m pytest")


# In one test, since later commands read what earlier ones wrote.
def test_every_other_command_runs_and_succeeds(clone: Path) -> None:
    commands = COMMANDS[2:]
    assert len(commands) >= 7
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python"
        done = run([sys.executable, *words[1:]], clone)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_python_example_runs(clone: Path) -> None:
    (example,) = (block for kind, block in BLOCKS if kind == "python")
    done = run(
        [sys.executable, "-c", example + "assert logits_BTV.shape == (1, 1, 384) and len(tokens[0]) <= 8\n"], clone
    )
    assert done.returncode == 0, done.stderr
