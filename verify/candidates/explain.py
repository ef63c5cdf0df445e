"""What a runtime's error message says about an export, on one line."""

import re
from itertools import pairwise

from refengine.config import Config
from verify.interface import QUERY_HEADS_FOR_KV_HEADS

# Two sizes that do not fit each other, as runtimes write them: "Expected size 32 but got size 8", "Got: 9
# Expected: 3", "mismatched dimensions of 3 and 9", "9 by 3", "3 vs 9"; or in shapes, "{1,9,4,64},{1,3,1,64}".
TWO_SIZES = re.compile(
    r"(?i)expected(?: size)?:? (\d+),? but got(?: size)?:? (\d+)|got:? (\d+),? expected:? (\d+)"
    r"|dimensions of (\d+) and (\d+)|(\d+) by (\d+)|(\d+) vs\.? (\d+)|(\d+) != (\d+)"
)
SHAPE = re.compile(r"[{\[(](\d+(?:, ?\d+)+)[}\])]")
NOISE = (  # of ONNX Runtime: its prefix, the path that is said anyway, and where in its source it happened
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : ",
    r"^Load model from .*? failed:",
    r"^.*\[OpenVINO-EP\] ",
    r"/\S+\.(?:cc|h):\d+ (?:[^()]{0,60}onnxruntime::[^()]*\([^()]*\) )?",
)
RING = "sliding_window_cache"  # of GroupQueryAttention
LONGEST = 400  # characters of a runtime's own words


def in_words(message: str, config: Config | None) -> str:
    """A runtime's message on one line, without source locations, then an explanation where there is one."""
    message = " ".join(message.split())
    explanation = explain_failure(message, config) if config else ""
    for noise in NOISE:
        message = re.sub(noise, "", message)
    if len(message) > LONGEST:  # where it happened comes first, and what was wrong last
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    return f"{message}: {explanation}" if explanation else message


def explain_failure(message: str, config: Config) -> str:
    """What a runtime's message says of the export, mostly two sizes that do not fit; empty for nothing."""
    if RING in message:
        return (
            "its layers keep a window of keys and values in a buffer that goes round, which onnxruntime-genai's own "
            "loop sets up: compare with --runtime genai, or build it with --extra_options windowed_kv_cache=false"
        )
    found = [match.groups() for match in TWO_SIZES.finditer(message)]
    sizes = {frozenset(int(size) for size in groups if size) for groups in found}
    shapes = [tuple(int(size) for size in shape.split(",")) for shape in SHAPE.findall(message)]
    for one, other in pairwise(shapes):
        if len(one) == len(other):
            sizes |= {frozenset(pair) for pair in zip(one, other, strict=True)}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads != kv_heads and {heads, kv_heads} in sizes:
        return f"{heads} is num_attention_heads and {kv_heads} num_key_value_heads: {QUERY_HEADS_FOR_KV_HEADS}"
    worked_out = config.hidden_size // heads
    if worked_out != config.head_dim and {worked_out, config.head_dim} in sizes:
        return (
            f"{worked_out} is hidden_size / num_attention_heads and {config.head_dim} the checkpoint's "
            "head_dim: the exporter worked out what it should have read; export it again with head_dim"
        )
    return ""
