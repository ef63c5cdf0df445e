"""A reference run kept in a file, to be used again."""

import json
import tokenize
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile

from refengine.errors import InputError
from refengine.tokens import Rows
from verify.files import replacing
from verify.truth.noise import Noise
from verify.truth.reference import LOGITS, Measured, ReferenceRun

FORMAT = 2  # of a saved run
# What reading an .npz file raises that is none, or no longer a whole one. An OverflowError is an infinite token, a
# MemoryError a size that nobody wrote; NotImplementedError and RuntimeError are zipfile's, of versions and encryption.
DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
    *(RecursionError, OverflowError, MemoryError, NotImplementedError, RuntimeError),
    *(BadZipFile, zlib.error, tokenize.TokenError),
)


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
                    "points": sorted([LOGITS, *run.caches]),
                }
            )
        )
    }
    arrays["flips_P"] = run.flips_P
    for name, measured in {LOGITS: run.logits, **run.caches}.items():
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
        with path.open("rb") as stream, NpzFile(stream) as file:
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
    run = ReferenceRun(prompts, tokens, measured.pop(LOGITS), flips_P, measured)
    positions = sum(run.lengths)
    for point in (run.logits, *run.caches.values()):
        if point.value64_PX.ndim != 2 or len(point.value64_PX) != positions or point.noise.rms_P.shape != (positions,):
            raise ValueError(f"expected {positions} positions, found arrays of {point.value64_PX.shape}")
    if flips_P.shape != (positions,):
        raise ValueError(f"expected {positions} positions, found {flips_P.shape}")
    return run


def _lists(rows: Rows) -> list[list[int]]:
    return [[int(token) for token in row] for row in rows]
