"""The JSON reports of benchmarks."""

import json
from dataclasses import asdict

from verify.report.bench import Benchmark
from verify.report.caches import CacheStudy


def as_json(found: Benchmark | CacheStudy) -> str:
    """What was measured as a JSON object on lines, its schema first; seconds and bytes throughout."""
    fields = asdict(found)
    return json.dumps({"schema": fields.pop("schema"), **fields}, indent=2, allow_nan=False) + "\n"
