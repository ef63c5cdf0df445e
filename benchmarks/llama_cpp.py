"""llama.cpp with a quantised cache against the reference with the same scheme, on the logits of one text.

    python -m benchmarks.llama_cpp MODEL.gguf [--tokens N] [--decoded N] [TYPE ...]

Needs the packages llama-cpp-python (compiled when it is installed: a C++ compiler, CMake, some minutes), gguf and
transformers. MODEL.gguf may hold quantised weights: both read a copy of it in float32, since llama.cpp multiplies
quantised weights with quantised activations. `python -m fixtures.smollm2 DIR --keep-gguf` makes one.

The unit is the noise of float32 under the scheme: the reference in float32 against itself in float64, flipped codes
included. For each cache type, with the rotation and without, llama.cpp is held against the reference

    float       without a quantised cache,
    query       with the scheme, but a query as it came,
    turned      with the scheme rotated the other way,
    same        with the scheme and a query in blocks, which is what llama.cpp computes.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama, __version__

from refengine import Weights, open_checkpoint
from refengine.codecs.ggml import TYPES, ggml, ggml_ops
from refengine.generate import new_cache
from refengine.model import forward
from refengine.ops import OPS, Ops
from refengine.scheme import FLOAT32, Scheme
from refengine.tokenizer import encode_prompt, load_tokenizer

TEXT = Path(__file__).parent.parent / "LICENSE"
COLUMNS = ("float", "query", "turned", "same")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each cache type and rotation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_cpp", description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL.gguf", type=Path)
    parser.add_argument("types", metavar="TYPE", nargs="*", help=f"of {', '.join(TYPES)}; all of them unless given")
    parser.add_argument("--tokens", type=int, default=128, help="of the text, that of the licence (default 128)")
    parser.add_argument("--decoded", type=int, default=32, help="of these, fed one at a time (default 32)")
    options = parser.parse_args(arguments)
    tokens = encode_prompt(load_tokenizer(options.model), TEXT.read_text(encoding="utf-8"), chat=False)[: options.tokens]
    with tempfile.TemporaryDirectory() as directory:
        model = in_float32(options.model, Path(directory) / "float32.gguf")
        weights, weights64 = (Weights.open(open_checkpoint(model), dtype) for dtype in (np.float32, np.float64))
        exact = logits(weights64, tokens, FLOAT32)
        noise = rms(logits(weights, tokens, FLOAT32), exact)
        plain = by_llama_cpp(model, tokens, options.decoded, "f32", rotated=False)
        print(f"llama-cpp-python {__version__}, {len(tokens)} tokens, {options.decoded} of them one at a time")
        print(f"cache in float32: rms of the reference's noise {noise:.1e}, of llama.cpp {rms(plain, exact) / noise:.2f} times that")
        print(f"{'cache':16} {'noise':>8} " + " ".join(f"{column:>10}" for column in COLUMNS))
        for name in options.types or TYPES:
            for rotated in (False, True):
                found = by_llama_cpp(model, tokens, options.decoded, name, rotated)
                scheme, turned = ggml(name, name, rotated), ggml(name, name, not rotated)
                same = logits(weights64, tokens, scheme, ggml_ops(scheme))
                noise = rms(logits(weights, tokens, scheme, ggml_ops(scheme)), same)
                references = exact, logits(weights64, tokens, scheme), logits(weights64, tokens, turned, ggml_ops(turned)), same
                ratios = " ".join(f"{rms(found, reference) / noise:10.2f}" for reference in references)
                print(f"{name + (' rotated' if rotated else ''):16} {noise:8.1e} {ratios}", flush=True)


def in_float32(source: Path, target: Path, layers: int) -> Path:
    """Copies a GGUF file with its tensors in float32, those of its first layers."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            value = layers if key.endswith(".block_count") else field.contents()
            writer.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        block = tensor.name.split(".")[1]
        if tensor.name.startswith("blk.") and int(block) >= layers:
            continue
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def by_llama_cpp(model: Path, tokens: list[int], decoded: int, cache_type: str, rotated: bool) -> np.ndarray:
    """`logits_TV` of llama.cpp on one thread."""
    os.environ["LLAMA_ATTN_ROT_DISABLE"] = "0" if rotated else "1"
    kind = gguf.GGMLQuantizationType[cache_type.upper()].value
    llama = Llama(
        str(model),
        n_ctx=len(tokens),
        n_batch=len(tokens),
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=True,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )
    prompt = len(tokens) - decoded
    llama.eval(tokens[:prompt])
    for token in tokens[prompt:]:
        llama.eval([token])
    found_TV = np.array(llama.scores[: len(tokens)])
    llama.close()
    return found_TV


def logits(weights: Weights, tokens: list[int], scheme: Scheme, ops: Ops = OPS) -> np.ndarray:
    """`logits_TV` of the reference."""
    token_ids_BT = np.array([tokens])
    positions_BT = np.arange(len(tokens))[None]
    return forward(weights, token_ids_BT, positions_BT, new_cache(weights, 1, scheme), ops=ops)[0]


def rms(one: np.ndarray, other: np.ndarray) -> float:
    """Of the difference, in float64."""
    return float(np.sqrt(np.square(one.astype(np.float64) - other).mean()))


if __name__ == "__main__":
    sys.exit(main())
