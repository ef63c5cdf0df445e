"""Tests that need a newer ONNX Runtime than the one with OpenVINO inside, in a virtual environment of its own.

    python -m tests.onnxruntime_environment

Both packages are imported as `onnxruntime`, so that they cannot share one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("onnxruntime==1.31.1", "hypothesis>=6.150", "pytest>=9", "-e", f"{REPOSITORY}[export]")
TESTS = "tests/verify/test_quantised_gqa.py"


def main() -> int:
    """Makes the environment and runs the tests there; returns the exit code of what failed, or 0."""
    with tempfile.TemporaryDirectory() as directory:
        python = Path(directory, "Scripts/python.exe" if os.name == "nt" else "bin/python")
        for command in (
            [sys.executable, "-m", "venv", directory],
            [python, "-m", "pip", "install", "--quiet", *PACKAGES],
            [python, "-m", "pytest", TESTS],
        ):
            if code := subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
