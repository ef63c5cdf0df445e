"""Traces written as other systems write them."""

import json
from pathlib import Path

import numpy as np

from verify.trace_file import Trace


def write_trace(trace: Trace, path: Path) -> Path:
    """As `.npz` where there are logits, else as JSON lines."""
    rows = range(len(trace.prompts))
    if trace.logits is not None:
        named = {"prompt_token_ids": trace.prompts, "token_ids": trace.tokens, "logits": trace.logits}
        np.savez_compressed(path, **{f"{name}_{row}": np.array(of[row]) for name, of in named.items() for row in rows})
        return path
    lines = [{"prompt_token_ids": trace.prompts[row], "token_ids": trace.tokens[row]} for row in rows]
    if trace.logprobs is not None:
        lines = [line | {"logprobs": logprobs} for line, logprobs in zip(lines, trace.logprobs, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
