"""Exports of small checkpoints for tests: made, run on a provider, and measured against the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from refengine import Weights, forward, open_checkpoint
from refengine.checkpoint import Checkpoint
from refengine.tokens import left_padded
from refengine.trace import Recorder
from tests.checkpoints import write_checkpoint
from verify.export import export_decoder

# A sanity bound, not the project's criterion: honest float32 is near 1 (0.66 to 1.95 in 3000 runs of the
# default checkpoint), and faults are far beyond.
NOISE_RATIO = 4.0

CPU = ("CPUExecutionProvider", {})
OPENVINO = ("OpenVINOExecutionProvider", {"device_type": "CPU", "precision": "FP32", "num_of_threads": "2"})
LENGTHS = (13, 9, 5)  # of the rows of the ragged batch


@dataclass(frozen=True)
class Exported:
    """A checkpoint, its export, and where that is."""

    checkpoint: Checkpoint
    path: Path


def exported(directory: Path, *, cache: bool = True, **checkpoint: object) -> Exported:
    """Writes a checkpoint and its export into a directory."""
    opened = open_checkpoint(write_checkpoint(directory / "checkpoint", **checkpoint))
    export_decoder(opened, directory / "model.onnx", cache=cache)
    return Exported(opened, directory / "model.onnx")


def session(path: Path, provider: tuple[str, dict[str, str]]) -> ort.InferenceSession:
    """Loads a model on a provider; a node that the provider leaves to the CPU provider is an error."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider is not CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return ort.InferenceSession(path, options, providers=[provider])


def run_in_steps(
    loaded: ort.InferenceSession,
    token_ids_BT,
    positions_BT,
    steps: Sequence[int],
) -> dict[str, np.ndarray]:
    """Feeds the columns in so many at a time, the cache carried on; all logits, and the last cache."""
    names = [output.name for output in loaded.get_outputs()]
    past = {
        i.name: np.zeros((len(token_ids_BT), i.shape[1], 0, i.shape[3]), np.float32)
        for i in loaded.get_inputs()
        if i.name.startswith("past")
    }
    logits, start = [], 0
    for step in steps:
        new, start = slice(start, start + step), start + step
        fed = {
            "input_ids": token_ids_BT[:, new],
            "attention_mask": (positions_BT[:, :start] >= 0).astype(np.int64),
            "position_ids": np.maximum(positions_BT[:, new], 0),
        }
        outputs = dict(zip(names, loaded.run(None, fed | past), strict=True))
        logits.append(outputs.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return {"logits": np.concatenate(logits, axis=1), **outputs}


def reference(checkpoint: Checkpoint, token_ids_BT, positions_BT, dtype) -> dict[str, np.ndarray]:
    """The reference's values under the export's output names, from one pass."""
    recorder = Recorder(frozenset(f"layers.{i}.self_attn.{kind}_cache" for i in range(3) for kind in "kv"))
    logits_BTV = forward(Weights.open(checkpoint, dtype), token_ids_BT, positions_BT, trace=recorder)
    kept = {}
    for point, array in recorder.arrays.items():
        _, layer, _, kind = point.split(".")
        kept[f"present.{layer}.{'key' if kind == 'k_cache' else 'value'}"] = array
    return {"logits": logits_BTV, **kept}


def noise_ratios(
    checkpoint: Checkpoint,
    token_ids_BT,
    positions_BT,
    found: dict[str, np.ndarray],
) -> dict[str, float]:
    """The noise ratio of every output, over the tokens that are no padding."""
    exact = reference(checkpoint, token_ids_BT, positions_BT, np.float64)
    rounded = reference(checkpoint, token_ids_BT, positions_BT, np.float32)
    real_BT = positions_BT >= 0

    def rms(name: str, values: np.ndarray) -> float:
        error = values - exact[name]
        by_token = error if name == "logits" else error.swapaxes(1, 2)
        return float(np.sqrt(np.mean(np.square(by_token[real_BT]))))

    assert all(values.shape == exact[name].shape for name, values in found.items())
    return {name: rms(name, values) / rms(name, rounded[name]) for name, values in found.items()}


def prompts(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids in rows of these lengths, left padded, and their positions."""
    rng = np.random.default_rng(5)
    return left_padded([rng.integers(0, vocab_size, length) for length in lengths])
