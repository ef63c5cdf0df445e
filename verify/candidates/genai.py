"""onnxruntime-genai's own generate loop, on a directory of its model builder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Past, Settings, Step
from verify.candidates.explain import in_words
from verify.candidates.library import Sizes, check_options, keeps_its_past, positive
from verify.candidates.onnx_file import GENAI_CONFIG, describe, find_onnx
from verify.errors import NoVerdict, RuntimeMissing
from verify.expect import EXACT, TOGETHER, Expectation, expectations, int8_activations, joined
from verify.feeds import CACHE_POINTS, check_logits

INSTALL = 'pip install "tokenproof[genai]"'
OPTIONS = ("max_length",)
MAX_LENGTH = 2048  # unless asked for: every start sets aside, and clears, a cache of so many tokens
# Whatever the directory asks for: the search that chooses the likeliest token.
GREEDY: Mapping[str, Any] = {
    "batch_size": 1,
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}


class GenaiCandidate:
    """A model builder's directory with a Generator; made by `open`.

    It keeps its past to itself: it goes on from its own last step or starts anew, in a Generator of its own. A batch
    cannot be fed given tokens after its prompts, so that it takes one row at a time.
    """

    runtime = "genai"
    can_pad_left = False
    can_merge = False

    def __init__(
        self, path: Path, described: "Described", settings: Settings, config: Config, start: Callable[[], Any]
    ):
        self.path = path
        self.interface = keeps_its_past(described.sizes)
        self.settings = settings
        self._described = described
        self._config = config
        self._start = start
        self._generator: Any = None
        self._last: Past | None = None
        self._choice = -1

    @classmethod
    def open(
        cls, path: str | Path, runtime: str, provider_options: Mapping[str, str], config: Config
    ) -> "GenaiCandidate":
        """Opens a model builder's export of the checkpoint with this configuration.

        Args:
            path: its directory, or the `.onnx` file in it.
            runtime: "genai".
            provider_options: `max_length`, the most tokens of a row.
            config: the checkpoint's.

        Raises:
            InputError: it is no such directory, its model is missing, or it is an export of another model.
            RuntimeMissing: onnxruntime-genai is not installed.
            NoVerdict: onnxruntime-genai cannot open it.
        """
        directory = Path(path) if Path(path).is_dir() else Path(path).parent
        described = _described(directory)
        file = find_onnx(directory)
        if Path(path).suffix == ".onnx" and not file.samefile(path):
            raise InputError(f"{path}: expected {file.name}, the model that {GENAI_CONFIG} beside it names")
        described.sizes.check(file, config)
        check_options(runtime, provider_options, OPTIONS)
        most = min(MAX_LENGTH, config.max_position_embeddings)
        requested = {**GREEDY, "max_length": positive(provider_options, "max_length", most)}
        genai = _import()
        try:
            model = genai.Model(str(directory))
        except RuntimeError as error:
            raise NoVerdict(f"{file}: onnxruntime-genai cannot open it: {in_words(str(error), config)}") from error
        effective = {
            **{name: version(name) for name in ("onnxruntime-genai", "onnxruntime")},
            "device_type": model.device_type,
            "decoder": described.settings,
        }
        settings = Settings({name: str(value) for name, value in requested.items()}, effective)
        return cls(file, described, settings, config, lambda: _generator(genai, model, requested))

    @property
    def expectation(self) -> Expectation:
        """What the graph asks for: float16, or int8 for inputs of products with quantised weights.

        It is read with the package `onnx`, which onnxruntime-genai does without; so does this, and expects float32.
        """
        try:
            file = describe(self.path)
        except RuntimeMissing:
            return EXACT
        narrow = expectations()["float16"] if file.product_dtype == "float16" else EXACT
        if file.rounds_together:
            return joined(narrow, TOGETHER)
        return joined(narrow, int8_activations(file.int8_block)) if file.int8_block else narrow

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds one row's new tokens, after its own last step if there is a past.

        Raises:
            NoVerdict: there are more rows, it fails, or its loop chooses another token than its logits do.
        """
        if past is not None and past is not self._last:
            raise ValueError("onnxruntime-genai goes on from its own last step alone")
        if len(token_ids_BT) != 1 or positions_BT.min() < 0:
            raise NoVerdict(f"{self.path}: onnxruntime-genai is fed one row at a time here, without padding")
        tokens = token_ids_BT[0].tolist()
        before = np.empty((1, 0), np.int64) if past is None else past.positions_BS
        positions_BS = np.append(before, positions_BT, axis=1)
        length, most = positions_BS.shape[1], int(self.settings.requested["max_length"])
        if length > most:
            raise NoVerdict(
                f"{self.path}: {length} tokens do not fit onnxruntime-genai's max_length of {most}; give "
                f"--provider-option max_length={length} or more"
            )
        try:
            if past is None:
                self._generator = self._start()
                self._generator.append_tokens(tokens)
            else:
                self._go_on(tokens, length)
            logits_BTV = np.array(self._generator.get_output(self._described.logits))
            check_logits(logits_BTV, token_ids_BT.shape, self.interface.vocab_size)
        except (RuntimeError, NoVerdict) as error:
            raise NoVerdict(f"{self.path}: onnxruntime-genai failed: {in_words(str(error), self._config)}") from error
        self._choice = int(logits_BTV[0, -1].argmax())
        self._last = Past({}, positions_BS)
        return Step(logits_BTV, self._last)

    def caches(self, past: Past) -> dict[str, np.ndarray]:
        """Keys and values after the last step, `x_BKSH` by trace point, of layers that keep them all."""
        slots = past.positions_BS.shape[1]
        found = {point: self._generator.get_output(name) for point, name in self._described.cache.items()}
        return {point: np.array(x_BKSH[:, :, :slots]) for point, x_BKSH in found.items()}

    def _go_on(self, tokens: list[int], length: int) -> None:
        """Its own loop chooses and reads the token; it is given one where another is to be fed, or it would end."""
        generator = self._generator
        if tokens == [self._choice] and not generator.is_done():
            generator.generate_next_token()
        if generator.token_count() < length:
            generator.append_tokens(tokens)
        else:
            generator.get_logits()  # reads the token that was chosen
        if (found := generator.get_sequence(0)[-len(tokens) :].tolist()) != tokens:
            raise NoVerdict(f"its loop went on with {found}, where the largest of its logits is that of {tokens}")


@dataclass(frozen=True)
class Described:
    """What a `genai_config.json` says: sizes, names of outputs, and other settings.

    Of the cache, names of outputs by trace point, for layers that keep more than a window.
    """

    sizes: Sizes
    logits: str
    cache: Mapping[str, str]
    settings: Mapping[str, Any]


def _described(directory: Path) -> Described:
    file = directory / GENAI_CONFIG
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a directory of onnxruntime-genai's model builder")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        model, decoder, search = said["model"], said["model"]["decoder"], said["search"]
        sizes = Sizes(
            layers=int(decoder["num_hidden_layers"]),
            query_heads=int(decoder["num_attention_heads"]),
            kv_heads=int(decoder["num_key_value_heads"]),
            head_dim=int(decoder["head_size"]),
            vocab_size=int(model["vocab_size"]),
        )
        outputs = decoder["outputs"]
        patterns = outputs["present_key_names"], outputs["present_value_names"]
        windowed = decoder.get("sliding_window") or {"layers": ()}
        cache = {
            f"layers.{layer}.self_attn.{point}": pattern % layer
            for layer in range(sizes.layers)
            if layer not in windowed.get("layers", range(sizes.layers))
            for point, pattern in zip(CACHE_POINTS, patterns, strict=True)
        }
        settings = {
            "session_options": decoder.get("session_options"),
            "sliding_window": decoder.get("sliding_window"),
            "past_present_share_buffer": search.get("past_present_share_buffer"),
        }
        return Described(sizes, outputs["logits"], cache, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not what the model builder writes ({error!r}); export it again") from error


def _import() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise RuntimeMissing(f"genai: onnxruntime-genai cannot be imported ({error}): {INSTALL}") from error
    return onnxruntime_genai


def _generator(genai: Any, model: Any, search: Mapping[str, Any]) -> Any:
    params = genai.GeneratorParams(model)
    params.set_search_options(**search)
    return genai.Generator(model, params)
