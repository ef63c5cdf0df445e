"""The fields of the JSON report that scripts rely on, and a check of them."""

from collections.abc import Mapping
from typing import Any

NUMBER = (int, float, str)  # a string where it is not finite
NOTHING = type(None)
VERDICTS = ("equal", "drift", "mismatch", "no-verdict")
REPORT: Mapping[str, Any] = {
    "schema": int,
    "verdict": str,
    "model": {"path": str, "model_type": str, "sha256": str},
    "candidate": {"path": str, "exporter": str, "sha256": str},
    "cells": list,
    "location": (NOTHING, dict),
    "diagnosis": str,
    "causes": list,
    "diagnosis_notes": list,
    "not_revealed": list,
    "notes": list,
    "prompts": int,
    "max_new_tokens": int,
    "weights": (NOTHING, dict),
}
CELL: Mapping[str, Any] = {
    "runtime": str,
    "cache": str,
    "settings": {"requested": dict, "effective": dict},
    "verdict": str,
    "batching": (NOTHING, str),
    "batch_size": (NOTHING, int),
    "tokens": (NOTHING, dict),
    "noise_ratio": (NOTHING, dict),
    "seconds": (NOTHING, dict),
    "reason": (NOTHING, str),
    "expect": str,
    "also": (NOTHING, dict),
    "explained_by": (NOTHING, str),
    "logprobs": (NOTHING, dict),
    "differences": list,
}
TOKENS: Mapping[str, Any] = {"compared": int, "equal": int, "ties": int, "first_mismatch": (NOTHING, dict)}
FIRST_MISMATCH: Mapping[str, Any] = {"row": int, "step": int, "expected": int, "actual": int, "margin": NUMBER}
NOISE_RATIO: Mapping[str, Any] = {"logits": NUMBER, "worst": {"point": str, "position": int, "ratio": NUMBER}}
SECONDS: Mapping[str, Any] = {"candidate": (NOTHING, float), "reference": float}
LOGPROBS: Mapping[str, Any] = {"compared": int, "largest": NUMBER, "rms": NUMBER}
DIFFERENCE: Mapping[str, Any] = {**FIRST_MISMATCH, "rank": int}


def check_fields(report: Mapping[str, Any]) -> None:
    """Asserts that a report has every field, each of its type; it may have more."""
    _check(report, REPORT, "report")
    assert report["schema"] == 1
    assert report["verdict"] in VERDICTS
    assert report["diagnosis"] in ("none", "named", "ambiguous", "unexplained")
    assert all(isinstance(line, str) for line in report["not_revealed"])
    assert report["cells"]
    for side in ("model", "candidate"):
        fingerprint = report[side]["sha256"]
        assert len(bytes.fromhex(fingerprint)) == 32 or (side == "candidate" and fingerprint == ""), side
    for cell in report["cells"]:
        _check_cell(cell)


def _check_cell(cell: Mapping[str, Any]) -> None:
    _check(cell, CELL, "cell")
    assert cell["verdict"] in VERDICTS
    assert cell["cache"] in ("on", "off", "unknown")
    # Of what another system decoded, it is not known how; and it may have kept nothing but tokens.
    elsewhere = cell["cache"] == "unknown"
    assert cell["batching"] in ((None,) if elsewhere else ("static", "dynamic", "continuous"))
    assert (cell["batch_size"] is None) == elsewhere
    without = cell["verdict"] == "no-verdict"
    assert (cell["reason"] is None) == (not without)
    for name, fields in {"tokens": TOKENS, "noise_ratio": NOISE_RATIO, "seconds": SECONDS}.items():
        assert (cell[name] is None) == without or (name == "noise_ratio" and elsewhere), name
        if cell[name] is not None:
            _check(cell[name], fields, name)
    if cell["seconds"]:
        assert (cell["seconds"]["candidate"] is None) == (cell["runtime"] == "trace")
    if cell["tokens"] and cell["tokens"]["first_mismatch"]:
        _check(cell["tokens"]["first_mismatch"], FIRST_MISMATCH, "first_mismatch")
    assert elsewhere or (cell["logprobs"] is None and cell["differences"] == [])
    if cell["logprobs"] is not None:
        _check(cell["logprobs"], LOGPROBS, "logprobs")
    for difference in cell["differences"]:
        _check(difference, DIFFERENCE, "difference")
        assert isinstance(difference["tie"], bool)


def _check(found: Any, fields: Mapping[str, Any], where: str) -> None:
    assert isinstance(found, dict), where
    for name, kind in fields.items():
        assert name in found, f"{where}: no {name}"
        if isinstance(kind, Mapping):
            _check(found[name], kind, f"{where}.{name}")
        else:
            right = isinstance(found[name], kind) and not (isinstance(found[name], bool))
            assert right, f"{where}.{name}: {found[name]!r}"
            assert kind is not NUMBER or not isinstance(found[name], str) or found[name] in ("nan", "inf", "-inf")
