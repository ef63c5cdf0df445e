"""Decode and prefill against ONNX Runtime, as ratios of medians from one run.

    python -m benchmarks.speed MODEL EXPORT.onnx

MODEL is a checkpoint directory, EXPORT.onnx its float32 export by optimum. Peers: ONNX Runtime's CPU provider and its
OpenVINO provider, both on the same export, default settings.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks.peers import OrtExport, RefEngine, alternate, decode_seconds, machine, prefill_seconds

PROMPT, DECODED, PREFILLED, ROUNDS = 16, 48, 512, 7


def main(model: Path, export: Path) -> None:
    """Prints the table."""
    engines = {
        "refengine": RefEngine(model),
        "ONNX Runtime, CPU": OrtExport(export, "CPUExecutionProvider"),
        "ONNX Runtime, OpenVINO": OrtExport(export, "OpenVINOExecutionProvider"),
    }
    random = np.random.default_rng(0)
    prompt_BT, long_BT = (random.integers(100, 20_000, (1, length)) for length in (PROMPT, PREFILLED))
    decode = alternate(
        {name: lambda e=engine: decode_seconds(e, prompt_BT, DECODED) for name, engine in engines.items()},
        ROUNDS,
    )
    prefill = alternate(
        {name: lambda e=engine: prefill_seconds(e, long_BT) for name, engine in engines.items()}, ROUNDS
    )
    print(machine())
    print(f"{'':24}{'decode, ms a token':>20}{'ratio':>8}{f'prefill of {PREFILLED}, s':>20}{'ratio':>8}")
    for name in engines:
        ratios = decode[name] / decode["refengine"], prefill[name] / prefill["refengine"]
        print(f"{name:24}{decode[name] * 1000:20.1f}{ratios[0]:8.2f}{prefill[name]:20.2f}{ratios[1]:8.2f}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
