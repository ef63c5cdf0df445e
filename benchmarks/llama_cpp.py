"""llama.cpp with a quantised cache against the reference with the same scheme, on the logits of one text.

    python -m benchmarks.llama_cpp MODEL.gguf [--layers N] [--tokens N] [--decoded N] [TYPE ...]

Needs the packages llama-cpp-python (compiled when it is installed: a C++ compiler, CMake, some minutes), gguf and
transformers. MODEL.gguf may hold quantised weights: both read a copy of it in float32, since llama.cpp multiplies
quantised weights with quantised activations. `python -m fixtures.smollm2 DIR --keep-gguf` makes one.

By default the copy has one layer. A difference in the last bit moves a value over the middle between two codes now and
then; from layer to layer such codes make others, until after thirty layers the float32 and the float64 run of the same
scheme are as far apart as either is from the run without one, and nothing can be told from logits.

A number is the rms over the logits of a token, the median over tokens, as a multiple of the noise: of the reference's
own between float32 and float64. For each cache type, with the rotation and without, llama.cpp is held against

    float       the reference without a quantised cache,
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
    parser.add_argument("--layers", type=int, default=1, help="the first ones of the model (default 1)")
    parser.add_argument("--tokens", type=int, default=128, help="of the text, that of the licence (default 128)")
    parser.add_argument("--decoded", type=int, default=32, help="of these, fed one at a time (default 32)")
    options = parser.parse_args(arguments)
    text = TEXT.read_text(encoding="utf-8")
    tokens = encode_prompt(load_tokenizer(options.model), text, chat=False)[: options.tokens]
    with tempfile.TemporaryDirectory() as directory:
        model = in_float32(options.model, Path(directory) / "float32.gguf", options.layers)
        weights, weights64 = (Weights.open(open_checkpoint(model), dtype) for dtype in (np.float32, np.float64))
        exact = logits(weights64, tokens, FLOAT32)
        noise = distance(logits(weights, tokens, FLOAT32), exact)
        plain = distance(by_llama_cpp(model, tokens, options.decoded, "f32"), exact)
        print(
            f"llama-cpp-python {__version__}, {options.layers} layers, {len(tokens)} tokens, {options.decoded} decoded"
        )
        print(f"{'cache':16} {'noise':>8} " + " ".join(f"{column:>8}" for column in COLUMNS))
        print(f"{'f32':16} {noise:8.1e} {plain / noise:8.2f}")
        for name in options.types or TYPES:
            for rotated in (False, True):
                scheme, turned = ggml(name, name, rotated), ggml(name, name, not rotated)
                same = logits(weights64, tokens, scheme, ggml_ops(scheme))
                noise = distance(logits(weights, tokens, scheme, ggml_ops(scheme)), same)
                query = logits(weights64, tokens, scheme)
                other = logits(weights64, tokens, turned, ggml_ops(turned))
                found = by_llama_cpp(model, tokens, options.decoded, name, rotated)
                ratios = " ".join(f"{distance(found, one) / noise:8.2f}" for one in (exact, query, other, same))
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


def by_llama_cpp(model: Path, tokens: list[int], decoded: int, cache_type: str, rotated: bool = False) -> np.ndarray:
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
        flash_attn=cache_type != "f32",  # a quantised cache needs it; one in float32 it would round to float16
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


def distance(one_TV: np.ndarray, other_TV: np.ndarray) -> float:
    """The rms difference of a token's logits, the median over tokens, in float64."""
    return float(np.median(np.sqrt(np.square(one_TV.astype(np.float64) - other_TV).mean(axis=1))))


if __name__ == "__main__":
    sys.exit(main())
