"""The JSON report of a benchmark."""

import json
from dataclasses import asdict

from verify.report.bench import Benchmark


def bench_as_json(benchmark: Benchmark) -> str:
    """The benchmark as a JSON object on lines, its schema first; seconds and bytes throughout."""
    fields = asdict(benchmark)
    return json.dumps({"schema": fields.pop("schema"), **fields}, indent=2, allow_nan=False) + "\n"
