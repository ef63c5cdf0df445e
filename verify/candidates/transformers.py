"""Checkpoints on transformers with torch: the model classes from which most exports are made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Past, Settings, Step
from verify.candidates.explain import in_words
from verify.candidates.library import Sizes, check_options
from verify.errors import NoVerdict, RuntimeMissing
from verify.expect import EXACT, Expectation, expectations
from verify.feeds import caches, check_logits, feed, next_past
from verify.interface import Declared, Interface, interface_of

INSTALL = 'pip install "tokenproof[transformers]"'
DTYPES = ("float32", "float16", "bfloat16")
OPTIONS = ("dtype", "attn_implementation")
LOADING = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ImportError,
)  # what it raises of files


class TransformersCandidate:
    """A checkpoint as `AutoModelForCausalLM` on a CPU; made by `open`. It is handed its past as a DynamicCache."""

    runtime = "transformers"
    can_pad_left = True
    can_merge = True

    def __init__(self, path: Path, interface: Interface, settings: Settings, config: Config, model: Any):
        self.path = path
        self.interface = interface
        self.settings = settings
        self._config = config
        self._model = model

    @classmethod
    def open(
        cls, path: str | Path, runtime: str, provider_options: Mapping[str, str], config: Config
    ) -> "TransformersCandidate":
        """Opens a checkpoint that may be the one with this configuration.

        Args:
            path: a checkpoint directory.
            runtime: "transformers".
            provider_options: `dtype` (float32 by default) and `attn_implementation` of `from_pretrained`.
            config: of the checkpoint compared against.

        Raises:
            InputError: it is no checkpoint directory, lacks a tensor, or is of another model.
            RuntimeMissing: transformers or torch is not installed.
            NoVerdict: transformers cannot load it, or not with these options.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: expected a checkpoint directory, with a config.json, for transformers to read")
        check_options(runtime, provider_options, OPTIONS)
        requested = {"dtype": "float32", **provider_options}
        if requested["dtype"] not in DTYPES:
            raise NoVerdict(f"--provider-option: expected dtype as {', '.join(DTYPES)}, found {requested['dtype']!r}")
        torch, transformers = _import()
        model = _load(path, {**requested, "dtype": getattr(torch, requested["dtype"])}, config)
        sizes = _sizes(model.config)
        sizes.check(path, config)
        effective = {
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),  # which is a class of torch's own
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": model.config._attn_implementation,
            "threads": torch.get_num_threads(),
        }
        return cls(path, _interface(sizes, requested["dtype"]), Settings(requested, effective), config, model)

    @property
    def expectation(self) -> Expectation:
        """What its dtype says that it computes."""
        return expectations().get(self.settings.effective["dtype"], EXACT)

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds new tokens (position -1 is left padding), after `past` if there is one.

        Raises:
            NoVerdict: it fails, or gives other shapes.
        """
        try:
            given = self._run(feed(self.interface, token_ids_BT, positions_BT, past))
            check_logits(given["logits"], token_ids_BT.shape, self.interface.vocab_size)
            return Step(given["logits"], next_past(self.interface, given, positions_BT, past))
        except (RuntimeError, ValueError, IndexError, NoVerdict) as error:
            raise NoVerdict(f"{self.path}: transformers failed: {in_words(str(error), self._config)}") from error

    def caches(self, past: Past) -> dict[str, np.ndarray]:
        """Keys and values that the last step gave, `x_BKSH` by trace point."""
        return caches(self.interface, past)

    def _run(self, fed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch
        from transformers import DynamicCache

        # Without the model's configuration, so that it keeps what a window has left behind: other rows may need it.
        cache: Any = DynamicCache()
        with torch.inference_mode():
            for number, layer in enumerate(self.interface.layers):
                key, value = (_tensor(torch, fed[name]) for name in (layer.key_in, layer.value_in) if name)
                cache.update(key, value, number)
            told = {name: _tensor(torch, fed[name]) for name in ("input_ids", "attention_mask", "position_ids")}
            logits = self._model(**told, past_key_values=cache, use_cache=True).logits
        given = {"logits": _array(torch, logits)}
        for layer, kept in zip(self.interface.layers, cache.layers, strict=True):
            given |= {layer.key_out: _array(torch, kept.keys), layer.value_out: _array(torch, kept.values)}
        return given


def _import() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise RuntimeMissing(f"transformers: it and torch cannot be imported ({error}): {INSTALL}") from error
    return torch, transformers


def _load(path: Path, requested: Mapping[str, Any], config: Config) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            path, **requested, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (*LOADING, SafetensorError, StrictDataclassError) as error:
        raise NoVerdict(f"{path}: transformers cannot load it: {in_words(str(error), config)}") from error
    if missing := sorted(told["missing_keys"]):  # which it would make up at random
        raise InputError(f"{path}: no tensor {missing[0]!r}; the checkpoint is incomplete or of another model")
    return model.eval()


def _sizes(of_model: Any) -> Sizes:
    heads = of_model.num_attention_heads
    return Sizes(
        layers=of_model.num_hidden_layers,
        query_heads=heads,
        kv_heads=of_model.num_key_value_heads,
        head_dim=getattr(of_model, "head_dim", None) or of_model.hidden_size // heads,
        vocab_size=of_model.vocab_size,
    )


def _interface(sizes: Sizes, dtype: str) -> Interface:
    told = [Declared(name, "int64", (None, None)) for name in ("input_ids", "attention_mask", "position_ids")]
    return interface_of([*told, *sizes.cache("past", dtype)], [sizes.logits(), *sizes.cache("present", dtype)])


def _tensor(torch: Any, array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.bfloat16:  # which torch does not exchange with NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(torch: Any, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
