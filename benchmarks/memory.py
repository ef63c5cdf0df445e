"""Peak memory of comparing a model of Llama-3.2-1B's shape with its float32 export, in all processes together.

    python -m benchmarks.memory [--directory DIRECTORY] [--layers LAYERS] [--runtime RUNTIME]

Writes 2.5 GB of random bfloat16 weights and an export of 5 GB (kept and used again with --directory, temporary
without), then runs `python -m verify compare` on them. What counts is the sum over the process and its workers of
their proportional share of memory, `Pss` of /proc/PID/smaps_rollup, ten times a second: pages of mapped files count,
once however many processes have them. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import machine
from benchmarks.streaming import LLAMA_3_2_1B, write_checkpoint

PROMPT = list(range(100, 116))
NEW_TOKENS = 8
EVERY = 0.1  # seconds


def main(
    config: Mapping[str, Any] = LLAMA_3_2_1B, directory: Path | None = None, runtime: str = "ort-cpu"
) -> dict[str, Any]:
    """Prints the verdicts and the peak; returns the report."""
    with tempfile.TemporaryDirectory(prefix="memory-") as temporary:
        place = directory or Path(temporary)
        checkpoint, export = place / "checkpoint", place / "export" / "model.onnx"
        if not (checkpoint / "config.json").is_file():
            write_checkpoint(checkpoint, config)
        if not export.is_file():
            export.parent.mkdir(parents=True, exist_ok=True)
            verify("export", checkpoint, export)
        prompts, report = Path(temporary, "prompts.jsonl"), Path(temporary, "report.json")
        prompts.write_text(json.dumps({"token_ids": PROMPT}), encoding="utf-8")
        size = sum(file.stat().st_size for file in export.parent.iterdir())
        began = time.perf_counter()
        peak = verify(
            *("compare", checkpoint, export, "--runtime", runtime, "--prompts", prompts),
            *("--max-new-tokens", NEW_TOKENS, "--json", report),
        )
        seconds = time.perf_counter() - began
        found = json.loads(report.read_text(encoding="utf-8"))
    print(machine())
    print(f"{size / 1e9:.2f} GB of export, {len(PROMPT)} + {NEW_TOKENS} tokens, {runtime}, {seconds:.0f} s in all")
    for cell in found["cells"]:
        own = (cell["peak_memory_bytes"] or 0) / 1e9
        ratio = cell["noise_ratio"] and cell["noise_ratio"]["logits"]
        print(f"cache {cell['cache']}: {cell['verdict']}, noise ratio {ratio}, the candidate alone {own:.2f} GB")
    print(f"peak of all processes together {peak / 1e9:.2f} GB")
    return found


def verify(*arguments: object) -> int:
    """Runs a command of `verify` to its end; gives the most bytes that it and its workers had together."""
    command: Sequence[str] = [sys.executable, "-m", "verify", *map(str, arguments)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, together(process.pid))
            time.sleep(EVERY)
    if process.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: failed with exit code {process.returncode}")
    return peak


def together(pid: int) -> int:
    """Memory of a process and those that it has started, at this moment."""
    try:
        own = psutil.Process(pid)
        return sum(proportional(process.pid) for process in (own, *own.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def proportional(pid: int) -> int:
    """A process's share of memory in bytes; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="Peak memory of a comparison.")
    parser.add_argument("--directory", type=Path, help="where checkpoint and export are, or are to be written and kept")
    parser.add_argument("--layers", type=int, default=LLAMA_3_2_1B["num_hidden_layers"], help="default: %(default)s")
    parser.add_argument("--runtime", default="ort-cpu", help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    options = _options()
    main({**LLAMA_3_2_1B, "num_hidden_layers": options.layers}, options.directory, options.runtime)
