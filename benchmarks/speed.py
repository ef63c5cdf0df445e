"""Decode and prefill against ONNX Runtime, as ratios of medians from one run.

    python -m benchmarks.speed MODEL EXPORT.onnx

MODEL is a checkpoint directory, EXPORT.onnx its float32 export by optimum. Peers: ONNX Runtime's CPU provider and its
OpenVINO provider, both on the same export with default settings, each engine in a process of its own, taking turns.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.peers import InItsOwnProcess, OrtExport, RefEngine, alternate, decode_seconds, machine, prefill_seconds

PROMPT, DECODED, PREFILLED, ROUNDS = 16, 48, 512, 7
SMALLEST_VOCABULARY = 384  # token ids that every model has


def main(model: Path, export: Path) -> None:
    """Prints the table."""
    engines = {
        "refengine": InItsOwnProcess(RefEngine, model),
        "ONNX Runtime, CPU": InItsOwnProcess(OrtExport, export, "CPUExecutionProvider"),
        "ONNX Runtime, OpenVINO": InItsOwnProcess(OrtExport, export, "OpenVINOExecutionProvider"),
    }
    random = np.random.default_rng(0)
    prompt_BT, long_BT = (random.integers(0, SMALLEST_VOCABULARY, (1, length)) for length in (PROMPT, PREFILLED))
    decode = alternate(
        {name: partial(engine, decode_seconds, prompt_BT, DECODED) for name, engine in engines.items()}, ROUNDS
    )
    prefill = alternate({name: partial(engine, prefill_seconds, long_BT) for name, engine in engines.items()}, ROUNDS)
    print(machine())
    print("ratio: how many times as long as refengine takes")
    print(f"{'':24}{'decode, ms a token':>20}{'ratio':>8}{f'prefill of {PREFILLED}, s':>20}{'ratio':>8}")
    for name in engines:
        ratios = decode[name] / decode["refengine"], prefill[name] / prefill["refengine"]
        print(f"{name:24}{decode[name] * 1000:20.1f}{ratios[0]:8.2f}{prefill[name]:20.2f}{ratios[1]:8.2f}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
