"""The fields of the JSON report that scripts rely on, and a check of them."""

from collections.abc import Mapping
from typing import Any

NUMBER = (int, float, str)  # a string where it is not finite
VERDICTS = ("equal", "drift", "mismatch", "no-verdict")
REPORT: Mapping[str, Any] = {
    "schema": int,
    "verdict": str,
    "model": {"path": str, "model_type": str, "sha256": str},
    "candidate": {"path": str, "exporter": str, "sha256": str},
    "cells": list,
    "location": (type(None), dict),
    "diagnosis": str,
    "causes": list,
    "not_revealed": list,
}
CELL: Mapping[str, Any] = {
    "runtime": str,
    "cache": str,
    "settings": {"requested": dict, "effective": dict},
    "verdict": str,
    "batching": str,
    "batch_size": int,
    "tokens": (type(None), dict),
    "noise_ratio": (type(None), dict),
    "seconds": (type(None), dict),
}
TOKENS: Mapping[str, Any] = {"compared": int, "equal": int, "ties": int, "first_mismatch": (type(None), dict)}
FIRST_MISMATCH: Mapping[str, Any] = {"row": int, "step": int, "expected": int, "actual": int, "margin": NUMBER}
NOISE_RATIO: Mapping[str, Any] = {"logits": NUMBER, "worst": {"point": str, "position": int, "ratio": NUMBER}}
SECONDS: Mapping[str, Any] = {"candidate": float, "reference": float}


def check_fields(report: Mapping[str, Any]) -> None:
    """Asserts that a report has every field, each of its type; it may have more."""
    _check(report, REPORT, "report")
    assert report["schema"] == 1
    assert report["verdict"] in VERDICTS
    assert report["diagnosis"] in ("none", "named", "ambiguous", "unexplained")
    assert all(isinstance(line, str) for line in report["not_revealed"])
    assert report["cells"]
    for side in ("model", "candidate"):
        assert len(bytes.fromhex(report[side]["sha256"])) == 32
    for cell in report["cells"]:
        _check(cell, CELL, "cell")
        assert cell["verdict"] in VERDICTS
        assert cell["cache"] in ("on", "off")
        assert cell["batching"] in ("static", "dynamic", "continuous")
        parts = {"tokens": TOKENS, "noise_ratio": NOISE_RATIO, "seconds": SECONDS}
        for name, fields in parts.items():
            assert (cell[name] is None) == (cell["verdict"] == "no-verdict"), name
            if cell[name] is not None:
                _check(cell[name], fields, name)
        if cell["tokens"] and cell["tokens"]["first_mismatch"]:
            _check(cell["tokens"]["first_mismatch"], FIRST_MISMATCH, "first_mismatch")


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
