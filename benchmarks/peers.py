"""What the benchmarks measure against, driven as users drive it, and the alternation that makes a ratio fair."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnxruntime

from refengine import Weights, forward, open_checkpoint
from refengine.generate import new_cache
from verify.machine import machine as machine


class RefEngine:
    """The reference engine in float32, resident."""

    def __init__(self, model: Path):
        self.weights = Weights.open(open_checkpoint(model))

    def prefill(self, token_ids_BT: np.ndarray) -> np.ndarray:
        """Logits of the last token; afterwards `step` goes on."""
        self.length = token_ids_BT.shape[1]
        self.cache = new_cache(self.weights, len(token_ids_BT))
        positions_BT = np.broadcast_to(np.arange(self.length), token_ids_BT.shape)
        return forward(self.weights, token_ids_BT, positions_BT, self.cache, last=True)[:, -1]

    def step(self, token_ids_B1: np.ndarray) -> np.ndarray:
        """Logits of the token that follows."""
        positions_B1 = np.full_like(token_ids_B1, self.length)
        self.length += 1
        return forward(self.weights, token_ids_B1, positions_B1, self.cache, last=True)[:, -1]


class OrtExport:
    """An ONNX export with optimum's names on ONNX Runtime, its cache handed from run to run."""

    def __init__(self, export: Path, provider: str):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(export, options, providers=[provider])
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]

    def prefill(self, token_ids_BT: np.ndarray) -> np.ndarray:
        """Logits of the last token; afterwards `step` goes on."""
        self.length = 0
        self.past = {
            name: np.zeros((len(token_ids_BT), tensor.shape[1], 0, tensor.shape[3]), np.float32)
            for name, tensor in self.inputs.items()
            if name.startswith("past_key_values")
        }
        return self._run(token_ids_BT)

    def step(self, token_ids_B1: np.ndarray) -> np.ndarray:
        """Logits of the token that follows."""
        return self._run(token_ids_B1)

    def _run(self, token_ids_BT: np.ndarray) -> np.ndarray:
        positions_BT = np.broadcast_to(np.arange(self.length, self.length + token_ids_BT.shape[1]), token_ids_BT.shape)
        self.length += token_ids_BT.shape[1]
        feed = {
            "input_ids": token_ids_BT,
            "attention_mask": np.ones((len(token_ids_BT), self.length), np.int64),
            "position_ids": np.ascontiguousarray(positions_BT),
        }
        results = dict(zip(self.outputs, self.session.run(None, feed | self.past), strict=True))
        self.past = {name: results[name.replace("past_key_values", "present")] for name in self.past}
        return results["logits"][:, -1]


Engine = RefEngine | OrtExport


def decode_seconds(engine: Engine, prompt_BT: np.ndarray, tokens: int) -> float:
    """Seconds a token of greedy decoding after a prefill that is not counted."""
    logits_BV = engine.prefill(prompt_BT)
    began = time.perf_counter()
    for _ in range(tokens):
        logits_BV = engine.step(logits_BV.argmax(axis=-1)[:, None])
    return (time.perf_counter() - began) / tokens


def prefill_seconds(engine: Engine, prompt_BT: np.ndarray) -> float:
    """Seconds from the prompt to the logits of its last token."""
    began = time.perf_counter()
    engine.prefill(prompt_BT)
    return time.perf_counter() - began


def alternate(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each measure over `rounds` rounds in which all take turns, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for round_ in range(rounds + 1):
        for name, measure in measures.items():
            seconds = measure()
            if round_:
                taken[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


class InItsOwnProcess:
    """An engine in a process of its own, so that its threads and memory are not the others' when it is not its turn."""

    def __init__(self, make: Callable[..., Engine], *arguments: object):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, arguments), daemon=True).start()

    def __call__(self, measure: Callable[..., float], *arguments: object) -> float:
        """What `measure(engine, *arguments)` returns over there."""
        self.connection.send((measure, arguments))
        return self.connection.recv()


def _serve(connection: Connection, make: Callable[..., Engine], arguments: tuple) -> None:
    engine = make(*arguments)
    while (request := _next(connection)) is not None:
        measure, given = request
        connection.send(measure(engine, *given))


def _next(connection: Connection) -> tuple[Callable[..., float], tuple] | None:
    try:
        return connection.recv()
    except EOFError:  # the other side has ended
        return None
