"""The reference's side: the right tokens, their logits and caches in float64, and the noise of float32."""

import json
import tokenize
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.errors import InputError
from refengine.generate import generate
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import OPS, Ops
from refengine.quant import ops_for
from refengine.scheme import Scheme, stored_as
from refengine.tokens import left_padded
from refengine.weights import Weights
from verify.files import replacing
from verify.noise import Noise, orders_for, rms

TOKENS_A_PASS = 512  # bounds the logits held at a time
FORMAT = 2  # of a saved run
# What reading an .npz file raises that is none, or no longer a whole one. An OverflowError is an infinite token, a
# MemoryError a size that nobody wrote; NotImplementedError and RuntimeError are zipfile's, of versions and encryption.
DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
    *(RecursionError, OverflowError, MemoryError, NotImplementedError, RuntimeError),
    *(BadZipFile, zlib.error, tokenize.TokenError),
)
Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Measured:
    """One tensor of the reference at every position of every row (P of them, row after row), and its float32 noise."""

    value64_PX: np.ndarray
    noise: Noise


@dataclass(frozen=True)
class ReferenceRun:
    """Greedy decoding of some prompts as the reference does it.

    Attributes:
        prompts: token ids of each row.
        tokens: what the reference chooses after each prompt.
        logits: at every position fed: each row's prompt and all its tokens but the last.
        flips_P: the largest float32 deviation of any single logit at each position; how far a tie may be apart.
        caches: trace point -> keys (after rotation) or values at the same positions, heads flattened.
    """

    prompts: Rows
    tokens: Rows
    logits: Measured
    flips_P: np.ndarray
    caches: Mapping[str, Measured]

    @property
    def lengths(self) -> list[int]:
        """Positions of each row."""
        return [len(prompt) + len(new) - 1 for prompt, new in zip(self.prompts, self.tokens, strict=True)]


class Reference:
    """A checkpoint, run to judge others.

    Weights are read when first needed, in float64 for the truth and in float32 for its noise, one after the other, so
    that never both are in memory.

    Args:
        checkpoint: the model.
        on_progress: told what is being done.
        scheme: how its cache is stored; None keeps what is computed. With a scheme the noise of float32 includes the
            codes that it makes fall on the other side of a step.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        on_progress: Callable[[str], None] = lambda what: None,
        scheme: Scheme | None = None,
    ):
        self.checkpoint = checkpoint
        self.on_progress = on_progress
        self.scheme = scheme

    def run(self, prompts: Rows, max_new_tokens: int, guess: Rows | None = None) -> ReferenceRun:
        """The reference's greedy run of `prompts`, `max_new_tokens` each, going on past end tokens.

        Args:
            guess: tokens that are probably right, such as a candidate's. One teacher-forced pass over them gives the
                reference's choice at every step; where each is the guess, then by induction the guess is its greedy
                run, and nothing had to be decoded step by step.
        """
        self.on_progress("reading the checkpoint in float64")
        weights = Weights.open(self.checkpoint, np.float64)
        endless = replace(weights, config=replace(weights.config, eos_token_id=()))
        self.on_progress("the reference in float64")
        ops = OPS if self.scheme is None else ops_for(self.scheme)
        tokens = guess or generate(endless, prompts, max_new_tokens, scheme=self.scheme, ops=ops)
        logits_PV, caches = one_pass(endless, prompts, tokens, self.scheme, ops)
        if chosen(logits_PV, prompts, tokens) != [list(row) for row in tokens]:
            self.on_progress("the reference decodes its own tokens in float64")
            tokens = generate(endless, prompts, max_new_tokens, scheme=self.scheme, ops=ops)
            logits_PV, caches = one_pass(endless, prompts, tokens, self.scheme, ops)
        return self._with_noise(prompts, tokens, logits_PV, caches)

    def _with_noise(
        self, prompts: Rows, tokens: Rows, logits64_PV: np.ndarray, caches64: Mapping[str, np.ndarray]
    ) -> ReferenceRun:
        weights = Weights.open(self.checkpoint, np.float32)
        flips_P = np.zeros(len(logits64_PV))
        errors: dict[str, list[np.ndarray]] = {"lm_head": [], **{name: [] for name in caches64}}
        for order, others in orders_for(len(logits64_PV)).items():
            ops = others if self.scheme is None else ops_for(self.scheme, others)
            self.on_progress(f"the reference in float32 ({order})")
            logits_PV, caches = one_pass(weights, prompts, tokens, self.scheme, ops)
            difference_PV = logits_PV - logits64_PV
            errors["lm_head"].append(rms(difference_PV, axis=-1))
            np.maximum(flips_P, np.abs(difference_PV).max(axis=-1), out=flips_P)
            for name, value_PX in caches.items():
                errors[name].append(rms(value_PX - caches64[name], axis=-1))
        measured = {name: Measured(value, Noise.of(errors[name], value)) for name, value in caches64.items()}
        logits = Measured(logits64_PV, Noise.of(errors["lm_head"], logits64_PV))
        return ReferenceRun(prompts, tokens, logits, flips_P, measured)


def chosen(logits_PV: np.ndarray, prompts: Rows, tokens: Rows) -> list[list[int]]:
    """The token that the logits choose at every step of every row."""
    return [logits_PV[steps].argmax(axis=-1).tolist() for steps in step_slices(prompts, tokens)]


def step_slices(prompts: Rows, tokens: Rows) -> list[slice]:
    """Of each row, the positions whose logits choose its new tokens, counted through all rows."""
    slices, end = [], 0
    for prompt, new in zip(prompts, tokens, strict=True):
        end += len(prompt) + len(new) - 1
        slices.append(slice(end - len(new), end))
    return slices


def one_pass(
    weights: Weights, prompts: Rows, tokens: Rows, scheme: Scheme | None, ops: Ops
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and keys and values by trace point, at every position of every row, rows one after the other."""
    token_ids_BT, positions_BT = left_padded(
        [[*prompt, *new[:-1]] for prompt, new in zip(prompts, tokens, strict=True)]
    )
    there_BT = positions_BT >= 0
    place_BT = there_BT.cumsum().reshape(there_BT.shape) - 1
    cache = KVCache(weights.config, len(token_ids_BT), scheme or stored_as(weights.dtype))
    logits_PV = np.empty((np.count_nonzero(there_BT), weights.config.vocab_size), weights.dtype)
    for columns in _columns(positions_BT, len(tokens[0]), scheme):
        logits_BTV = forward(weights, token_ids_BT[:, columns], positions_BT[:, columns], cache, ops=ops)
        logits_PV[place_BT[:, columns][there_BT[:, columns]]] = logits_BTV[there_BT[:, columns]]
    caches = {}
    for layer in range(weights.config.num_hidden_layers):
        for name, x_BKSH in zip("kv", cache.read(layer, weights.dtype), strict=True):
            caches[f"layers.{layer}.self_attn.{name}_cache"] = x_BKSH.swapaxes(1, 2)[there_BT].reshape(
                len(logits_PV), -1
            )
    return logits_PV, caches


def _columns(positions_BT: np.ndarray, new_tokens: int, scheme: Scheme | None) -> list[slice]:
    """The columns of each pass: as many as memory is meant for; with a scheme, those of a runtime that decodes.

    What a token attends to may depend on the pass that brings it when the cache is not exact: the prompts are one pass,
    and every new token is one.
    """
    rows, width = positions_BT.shape
    starts = list(range(0, width, max(1, TOKENS_A_PASS // rows)))
    if scheme is not None:
        starts = [0, *range(width - (new_tokens - 1), width)]
    return [slice(*ends) for ends in pairwise([*starts, width])]


def save_reference(path: Path, run: ReferenceRun, model_sha256: str) -> None:
    """Writes a reference run to one `.npz` file, to be used again by `load_reference`."""
    arrays: dict[str, Any] = {
        "header": np.array(
            json.dumps(
                {
                    "format": FORMAT,
                    "model_sha256": model_sha256,
                    "prompts": _lists(run.prompts),
                    "tokens": _lists(run.tokens),
                    "points": sorted(["lm_head", *run.caches]),
                }
            )
        )
    }
    arrays["flips_P"] = run.flips_P
    for name, measured in {"lm_head": run.logits, **run.caches}.items():
        arrays[f"{name}/value64"] = measured.value64_PX
        arrays[f"{name}/rms"] = measured.noise.rms_P
        arrays[f"{name}/bounds"] = np.array([measured.noise.overall_bound, measured.noise.position_bound])
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def load_reference(path: Path, model_sha256: str, prompts: Rows, max_new_tokens: int) -> ReferenceRun:
    """Reads a saved reference run.

    Raises:
        InputError: the file is not one, or is of another model, other prompts or another number of new tokens.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            arrays = {name: file[name] for name in file.files if name != "header"}
        run = _run_of(header, arrays)
        made_from = str(header["model_sha256"])
    except DAMAGED as error:
        raise InputError(f"{path}: not a whole reference run ({error}); make one with --save-reference") from error
    again = "make it again with --save-reference"
    if made_from != model_sha256:
        raise InputError(
            f"{path}: made from a model of sha256 {made_from[:12]}, this one has {model_sha256[:12]}; {again}"
        )
    if run.prompts != _lists(prompts):
        raise InputError(f"{path}: made from other prompts; use the same ones, or {again}")
    if any(len(new) != max_new_tokens for new in run.tokens):
        raise InputError(
            f"{path}: made with --max-new-tokens {len(run.tokens[0])}, asked for {max_new_tokens}; {again}"
        )
    return run


def _run_of(header: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> ReferenceRun:
    """The run in a file's contents. Raises ValueError, KeyError or TypeError when they are not what `save` writes."""
    if header["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, found {header['format']!r}")
    prompts, tokens = _lists(header["prompts"]), _lists(header["tokens"])
    flips_P = arrays.pop("flips_P")
    points = sorted({name.rsplit("/", 1)[0] for name in arrays})
    if points != header["points"]:  # a damaged archive may list fewer arrays than it holds
        raise ValueError(f"expected {len(header['points'])} trace points, found {len(points)}")
    measured = {
        point: Measured(
            arrays[f"{point}/value64"], Noise(arrays[f"{point}/rms"], *map(float, arrays[f"{point}/bounds"]))
        )
        for point in points
    }
    run = ReferenceRun(prompts, tokens, measured.pop("lm_head"), flips_P, measured)
    positions = sum(run.lengths)
    for point in (run.logits, *run.caches.values()):
        if point.value64_PX.ndim != 2 or len(point.value64_PX) != positions or point.noise.rms_P.shape != (positions,):
            raise ValueError(f"expected {positions} positions, found arrays of {point.value64_PX.shape}")
    if flips_P.shape != (positions,):
        raise ValueError(f"expected {positions} positions, found {flips_P.shape}")
    return run


def _lists(rows: Rows) -> list[list[int]]:
    return [[int(token) for token in row] for row in rows]
