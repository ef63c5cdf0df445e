"""GGUF files on llama.cpp, through llama-cpp-python."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refengine.codecs.ggml import LEAST_ROTATION, TYPES, ggml
from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Past, Settings, Step
from verify.candidates.library import Sizes, check_options, keeps_its_past, positive
from verify.errors import NoVerdict, RuntimeMissing
from verify.expect import EXACT, Expectation, expectations, joined

INSTALL = 'pip install "tokenproof[llama-cpp]" (it is compiled: a C++ compiler and CMake have to be there)'
OPTIONS = ("n_ctx", "n_threads", "type_k", "type_v", "flash_attn")
CONTEXT = 2048  # unless asked for: as many tokens have their logits and a place in the cache
CACHE_TYPES = ("f32", "f16", *TYPES)
DEFAULT_TYPE = "f16"
# What weights are mostly -> the arithmetic of a product with them, which is that of the other side: blocks of 32 in
# int8 for all that ggml quantises in blocks of 32, else the type of the weights.
ARITHMETICS: Mapping[str, str] = {
    "F16": "float16",
    "BF16": "bfloat16",
    **{name.upper(): "int8-activations" for name in TYPES},
}
SWITCH: Mapping[str, bool] = {"true": True, "false": False}


class LlamaCppCandidate:
    """A `.gguf` file opened by llama.cpp; made by `open`.

    It keeps its past to itself, a row at a time: it goes on from its own last step or starts anew. Attention reads
    keys and values as the cache stores them in every pass, a first one too.
    """

    runtime = "llama.cpp"
    can_pad_left = False
    can_merge = False

    def __init__(self, path: Path, sizes: Sizes, settings: Settings, llama: Any):
        self.path = path
        self.interface = keeps_its_past(sizes)
        self.settings = settings
        self._sizes = sizes
        self._llama = llama
        self._last: Past | None = None

    @classmethod
    def open(
        cls, path: str | Path, runtime: str, provider_options: Mapping[str, str], config: Config
    ) -> "LlamaCppCandidate":
        """Opens a file that may be the checkpoint with this configuration.

        Args:
            path: a `.gguf` file.
            runtime: "llama.cpp".
            provider_options: of llama-cpp-python's `Llama`: n_ctx, n_threads, type_k and type_v (of the cache, by
                name), flash_attn (true or false).
            config: of the checkpoint compared against.

        Raises:
            InputError: it is no GGUF file, or is of another model.
            RuntimeMissing: llama-cpp-python is not installed.
            NoVerdict: llama.cpp cannot open it, or not with these options.
        """
        path = Path(path)
        _check_gguf(path)
        check_options(runtime, provider_options, OPTIONS)
        given = _arguments(provider_options, config)
        llama_cpp = _import()
        types = {name: _type(llama_cpp, provider_options.get(name, DEFAULT_TYPE)) for name in ("type_k", "type_v")}
        try:
            llama = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **given, **types)
        except (ValueError, RuntimeError) as error:
            raise NoVerdict(f"{path}: llama.cpp cannot open it: {error}") from error
        sizes = _sizes(llama)
        sizes.check(path, config)
        return cls(path, sizes, Settings(dict(provider_options), _effective(llama_cpp, llama)), llama)

    @property
    def expectation(self) -> Expectation:
        """What its settings say that its cache is, and the file that its products are."""
        keys, values = (str(self.settings.effective[name]) for name in ("type_k", "type_v"))
        known = expectations()
        products = known[ARITHMETICS.get(str(self.settings.effective["weights"]), EXACT.name)]
        if DEFAULT_TYPE in (keys, values):
            return joined(products, known["float16-attention"])
        if not {keys, values} <= TYPES.keys():
            return products
        return joined(products, _cache(keys, values, rotated=self.settings.effective["rotated"]))

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds one row's new tokens, after its own last step if there is a past.

        Raises:
            NoVerdict: there are more rows, the context is too short for them, or llama.cpp fails.
        """
        if past is not None and past is not self._last:
            raise ValueError("llama.cpp goes on from its own last step alone")
        if len(token_ids_BT) != 1 or positions_BT.min() < 0:
            raise NoVerdict(f"{self.path}: llama.cpp is fed one row at a time here, without padding")
        if past is None:
            self._llama.reset()
        first, last = self._llama.n_tokens, self._llama.n_tokens + token_ids_BT.shape[1]
        if last > self._llama.n_ctx():
            raise NoVerdict(
                f"{self.path}: {last} tokens do not fit llama.cpp's context of {self._llama.n_ctx()}; give "
                f"--provider-option n_ctx={last} or more"
            )
        try:
            self._llama.eval(token_ids_BT[0].tolist())
        except (ValueError, RuntimeError) as error:
            raise NoVerdict(f"{self.path}: llama.cpp failed: {error}") from error
        self._last = Past({}, np.arange(last)[None])
        return Step(np.array(self._llama.scores[None, first:last]), self._last)

    def caches(self, past: Past) -> dict[str, np.ndarray]:
        """None: it does not show its keys and values."""
        return {}


def _cache(keys: str, values: str, rotated: bool) -> Expectation:
    scheme = ggml(keys, values, rotated)
    named = next((known for known in expectations().values() if known.scheme == scheme), None)
    return named or Expectation(f"ggml-{keys}-{values}{'-rotated' if rotated else ''}", scheme)


def _check_gguf(path: Path) -> None:
    if path.suffix != ".gguf":
        raise InputError(f"{path}: expected a .gguf file for llama.cpp to read")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if magic != b"GGUF":
        raise InputError(f"{path}: not a GGUF file, which begins with the letters GGUF; copy or download it again")


def _arguments(options: Mapping[str, str], config: Config) -> dict[str, Any]:
    """What `Llama` is given besides types. Its defaults are kept, but for the length of the context."""
    given: dict[str, Any] = {"n_ctx": positive(options, "n_ctx", min(CONTEXT, config.max_position_embeddings))}
    if "n_threads" in options:
        given["n_threads"] = given["n_threads_batch"] = positive(options, "n_threads", 1)
    allowed = {"flash_attn": SWITCH, "type_k": CACHE_TYPES, "type_v": CACHE_TYPES}
    for name, values in allowed.items():  # of an unknown type llama.cpp would end the process
        if (found := options.get(name)) not in (None, *values):
            raise NoVerdict(f"--provider-option: expected {name} as one of {', '.join(values)}, found {found!r}")
    if "flash_attn" in options:
        given["flash_attn"] = SWITCH[options["flash_attn"]]
    return given


def _type(llama_cpp: Any, name: str) -> int:
    return getattr(llama_cpp, f"GGML_TYPE_{name.upper()}")


def _sizes(llama: Any) -> Sizes:
    """By the file's metadata, whose values llama.cpp gives as text."""
    said, family = llama.metadata, llama.metadata["general.architecture"]
    heads = int(said[f"{family}.attention.head_count"])
    return Sizes(
        layers=int(said[f"{family}.block_count"]),
        query_heads=heads,
        kv_heads=int(said.get(f"{family}.attention.head_count_kv", heads)),
        head_dim=int(said.get(f"{family}.attention.key_length", llama.n_embd() // heads)),
        vocab_size=llama.n_vocab(),
    )


def _effective(llama_cpp: Any, llama: Any) -> dict[str, Any]:
    context = llama.context_params
    names = {_type(llama_cpp, name): name for name in CACHE_TYPES}
    sizes = _sizes(llama)
    # Source: llama.cpp, src/llama-kv-cache.cpp, llama_kv_cache::llama_kv_cache, 2026-11
    rotated = sizes.head_dim % LEAST_ROTATION == 0 and os.environ.get("LLAMA_ATTN_ROT_DISABLE", "0") == "0"
    return {
        "llama-cpp-python": llama_cpp.__version__,
        # "llama 256M Q4_1", "llama 256M (guessed) Q8_0": by its metadata, or by what most of its tensors are.
        "weights": llama._model.desc().split()[-1],
        "n_ctx": llama.n_ctx(),
        "n_threads": context.n_threads,
        "n_threads_batch": context.n_threads_batch,
        "type_k": names[context.type_k],
        "type_v": names[context.type_v],
        "flash_attn": bool(context.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED),
        "rotated": rotated,
        "system": llama_cpp.llama_print_system_info().decode(),
    }


def _import() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise RuntimeMissing(f"llama.cpp: llama-cpp-python cannot be imported ({error}): {INSTALL}") from error
    return llama_cpp
