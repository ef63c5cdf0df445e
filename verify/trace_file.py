"""The record of what another system decoded, as a file: token ids, and perhaps logits or top-k log-probabilities.

Either JSON lines, a row each, under the names that vLLM and OpenAI use; other names are passed over:

    {"prompt_token_ids": [40, 41], "token_ids": [7, 8], "logprobs": [[[7, -0.1], [9, -2.4]], [[8, -0.3], [5, -1.6]]]}

`logprobs` are optional: for each new token, pairs of a token id and the natural logarithm of its probability, as many
as there are, in any order. Or an `.npz` file with arrays that are numbered by row: `prompt_token_ids_0` and
`token_ids_0`, whole numbers, and optionally `logits_0`, floating point of shape (new tokens, vocabulary). All rows have
what is optional, or none.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from refengine.config import Config
from refengine.config_values import is_whole
from refengine.errors import InputError
from refengine.requests import check_request
from refengine.tokens import Rows
from verify.truth.saved_reference import DAMAGED

TopLogprobs = Sequence[Sequence[tuple[int, float]]]  # at each step of a row: some tokens and their log-probabilities

FORMAT = (
    'expected JSON lines with "prompt_token_ids" and "token_ids", or an .npz file with prompt_token_ids_0, token_ids_0'
)
BEGINS_A_ZIP = b"PK"
STEMS = ("prompt_token_ids", "token_ids", "logits")


@dataclass(frozen=True)
class Trace:
    """What another system decoded.

    Attributes:
        prompts: token ids of each row.
        tokens: what came after each prompt, at least one token; of any number.
        logits: of each row (steps, V), those that chose its tokens; None where they were not kept.
        logprobs: of each row and step, the log-probabilities of some tokens, in nats; None where they were not kept.
    """

    prompts: Rows
    tokens: Rows
    logits: Sequence[np.ndarray] | None = None
    logprobs: Sequence[TopLogprobs] | None = None


def read_trace(path: Path) -> Trace:
    """Reads a trace, whichever of the two kinds it is.

    Raises:
        InputError: the file cannot be read, is no trace, or its parts do not fit each other.
    """
    try:
        with path.open("rb") as stream:
            zipped = stream.read(len(BEGINS_A_ZIP)) == BEGINS_A_ZIP
        return _from_arrays(path) if zipped else _from_lines(path)
    except OSError as error:
        raise InputError(f"{path}: the trace could not be read ({error})") from error


def check_trace(path: Path | str, trace: Trace, config: Config) -> None:
    """Raises InputError where a trace cannot be of this model: its ids, its vocabulary, or how far it goes."""
    for row, (prompt, new) in enumerate(zip(trace.prompts, trace.tokens, strict=True)):
        where = f"{path}: row {row}"
        _check_ids(f"{where}: prompt_token_ids", prompt, config)
        _check_ids(f"{where}: token_ids", new, config)
        if trace.logprobs is not None:
            _check_ids(f"{where}: logprobs", (token for step in trace.logprobs[row] for token, _ in step), config)
        if trace.logits is not None and trace.logits[row].shape[1] != config.vocab_size:
            raise InputError(
                f"{where}: logits: expected {config.vocab_size} a step, the model's vocabulary, found "
                f"{trace.logits[row].shape[1]}: a trace whose tokens are not the model's"
            )
        check_request(config, prompt, len(new), name=where)


def _check_ids(where: str, ids: Iterable[int], config: Config) -> None:
    wrong = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise InputError(
            f"{where}: expected token ids from 0 to {config.vocab_size - 1}, found {wrong}: a trace whose tokens are "
            "not the model's"
        )


def _from_lines(path: Path) -> Trace:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no trace; {FORMAT}") from error
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: an empty trace; {FORMAT}")
    rows = [(where, _object(where, line)) for where, line in numbered]
    prompts = [_whole_numbers(where, row, "prompt_token_ids") for where, row in rows]
    tokens = [_whole_numbers(where, row, "token_ids") for where, row in rows]
    without = [where for where, row in rows if row.get("logprobs") is None]
    if len(without) == len(rows):
        return Trace(prompts, tokens)
    if without:
        raise InputError(f"{without[0]}: logprobs: expected them in every row or in none, found none in this one")
    logprobs = [_top_logprobs(where, row["logprobs"], len(new)) for (where, row), new in zip(rows, tokens, strict=True)]
    return Trace(prompts, tokens, logprobs=logprobs)


def _object(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); {FORMAT}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: no JSON object; {FORMAT}")
    return row


def _whole_numbers(where: str, row: Mapping[str, Any], name: str) -> list[int]:
    ids = row.get(name)
    if not isinstance(ids, list) or not ids or not all(map(is_whole, ids)):
        raise InputError(f"{where}: {name}: expected a list of at least one whole number, found {json.dumps(ids):.60}")
    return ids


def _top_logprobs(where: str, given: Any, steps: int) -> TopLogprobs:
    if not isinstance(given, list) or len(given) != steps:
        found = f"{len(given)}" if isinstance(given, list) else json.dumps(given)
        raise InputError(f"{where}: logprobs: expected a list for each of the {steps} token_ids, found {found:.60}")
    for step, pairs in enumerate(given):
        if not isinstance(pairs, list) or not pairs or not all(map(_is_token_and_number, pairs)):
            raise InputError(
                f"{where}: logprobs of step {step}: expected at least one [token id, finite number], found "
                f"{json.dumps(pairs):.60}"
            )
    return [[(token, float(logprob)) for token, logprob in pairs] for pairs in given]


def _is_token_and_number(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not is_whole(pair[0]):
        return False
    # A whole number of any length compares with infinity; not a number compares false.
    return (isinstance(pair[1], float) or is_whole(pair[1])) and -math.inf < pair[1] < math.inf


def _from_arrays(path: Path) -> Trace:
    try:
        with path.open("rb") as stream, NpzFile(stream) as file:
            names = {name for name in file.files if name.rstrip("0123456789").removesuffix("_") in STEMS}
            arrays = {name: np.asarray(file[name]) for name in names}
    except DAMAGED as error:
        raise InputError(f"{path}: not a whole .npz file ({error}); {FORMAT}") from error
    if not names:
        raise InputError(f"{path}: no trace; {FORMAT}")
    rows = range(len({name.rpartition("_")[-1] for name in names}))
    stems = STEMS if any(name.startswith("logits_") for name in names) else STEMS[:2]
    missing = next((name for row in rows for stem in stems if (name := f"{stem}_{row}") not in names), None)
    if missing is not None:
        raise InputError(f"{path}: expected {', '.join(stems)} of every row, numbered from 0; {missing} is missing")
    prompts = [_whole_array(path, arrays, f"prompt_token_ids_{row}") for row in rows]
    tokens = [_whole_array(path, arrays, f"token_ids_{row}") for row in rows]
    if stems == STEMS:
        return Trace(prompts, tokens, [_logits(path, arrays, row, len(new)) for row, new in enumerate(tokens)])
    return Trace(prompts, tokens)


def _whole_array(path: Path, arrays: Mapping[str, np.ndarray], name: str) -> list[int]:
    ids = arrays[name]
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{path}: {name}: expected one axis of at least one whole number, found {ids.dtype} {ids.shape}"
        )
    return ids.tolist()


def _logits(path: Path, arrays: Mapping[str, np.ndarray], row: int, steps: int) -> np.ndarray:
    logits_TV = arrays[f"logits_{row}"]
    if logits_TV.ndim != 2 or len(logits_TV) != steps or logits_TV.dtype.kind != "f":
        raise InputError(
            f"{path}: logits_{row}: expected floating point of shape ({steps}, vocabulary), as token_ids_{row} has "
            f"{steps}, found {logits_TV.dtype} {logits_TV.shape}"
        )
    return logits_TV
