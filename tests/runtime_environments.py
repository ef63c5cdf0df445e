"""Tests of runtimes that cannot share an environment with the others, each in a virtual environment of its own.

    python -m tests.runtime_environments [NAME ...]

ONNX Runtime and ONNX Runtime with OpenVINO inside are both imported as `onnxruntime`; torch is large; llama.cpp is
compiled, which needs a C++ compiler and CMake, and the better part of ten minutes of a processor. Nothing is skipped.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TESTING = ("hypothesis>=6.150", "pytest>=9", "pytest-xdist>=3.8")


@dataclass(frozen=True)
class Environment:
    """What an environment holds besides this project with `extras`, and the tests that run there.

    Attributes:
        module: of the runtime, without which those tests would be skipped.
    """

    module: str
    extras: str
    packages: Sequence[str]
    tests: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> int:
        """Makes the environment and runs the tests there; returns the exit code of what failed, or 0."""
        with tempfile.TemporaryDirectory() as directory:
            python = Path(directory, "Scripts/python.exe" if os.name == "nt" else "bin/python")
            for command in (
                [sys.executable, "-m", "venv", directory],
                [python, "-m", "pip", "install", "--quiet", *TESTING, *self.packages, "-e", self._project],
                [python, "-c", f"import {self.module}"],
                [python, "-m", "pytest", *self.tests],
            ):
                done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | self.variables, check=False)
                if done.returncode:
                    return done.returncode
        return 0

    @property
    def _project(self) -> str:
        return f"{REPOSITORY}[{self.extras}]"


ENVIRONMENTS: Mapping[str, Environment] = {
    "onnxruntime": Environment(
        "onnxruntime", "export", ["onnxruntime==1.31.1"], ["tests/verify/test_quantised_gqa.py"]
    ),
    "genai": Environment("onnxruntime_genai", "genai", ["onnxruntime==1.31.1"], ["tests/verify/test_genai.py"]),
    "transformers": Environment(
        "torch",
        "export,transformers",
        ["torch==2.13.0", "transformers==5.23.0"],
        ["tests/verify/test_transformers.py"],
        {"OMP_NUM_THREADS": "1"},  # of small matrices more take longer
    ),
    "llama.cpp": Environment(
        "llama_cpp",
        "export,llama-cpp,openai,tokenizer",
        ["llama-cpp-python[server]==0.3.36"],
        ["tests/verify/test_llama_cpp.py", "tests/verify/test_openai_live.py"],
        # Without what reads pictures, half of what there is to compile.
        {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"},
    ),
}


def main() -> int:
    """Checks the environments named, or all of them, one after the other; returns the first exit code that is not 0."""
    for name in sys.argv[1:] or ENVIRONMENTS:
        print(f"== {name}", flush=True)
        if code := ENVIRONMENTS[name].check():
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
