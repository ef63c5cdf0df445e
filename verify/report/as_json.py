"""The JSON report."""

import json
import math
from dataclasses import asdict
from typing import Any

from verify.report.result import Diagnosis, Report


def as_json(report: Report) -> str:
    """The report as a JSON object on lines; numbers that are not finite are the strings "nan", "inf", "-inf"."""
    fields = asdict(report)
    diagnosed = fields.pop("diagnosed") or asdict(Diagnosis("unexplained"))
    ordered = {
        "schema": fields.pop("schema"),
        "verdict": report.verdict,
        "model": fields.pop("model"),
        "candidate": fields.pop("candidate"),
        "cells": fields.pop("cells"),
        "location": diagnosed["location"],
        "diagnosis": report.diagnosis,
        "causes": diagnosed["causes"],
        "diagnosis_notes": diagnosed["notes"],
        **fields,
    }
    return json.dumps(_finite(ordered), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
