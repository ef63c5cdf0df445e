"""Exports on OpenVINO itself: its own IR, stateful or with the past as inputs, and ONNX files that it converts."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refengine.codecs.openvino import openvino as stateful_cache
from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Past, Settings, Step
from verify.candidates.explain import in_words
from verify.candidates.onnx_file import OnnxFile
from verify.candidates.openvino_file import IrFile
from verify.candidates.openvino_session import (
    DEVICE,
    INTEGER_WEIGHTS,
    compiled,
    declared,
    described,
    fused_in,
    model_of,
)
from verify.errors import NoVerdict
from verify.expect import EXACT, TOGETHER, Expectation, expectations, int8_activations, joined
from verify.feeds import caches, check_logits, feed, next_past
from verify.interface import Interface, check_same_model, interface_of

STATE_NAME = re.compile(r"past_key_values\.(\d+)\.(key|value)")
CACHE_PRECISIONS = ("KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")
GROUP_SIZES = ("KEY_CACHE_GROUP_SIZE", "VALUE_CACHE_GROUP_SIZE")
ARITHMETICS: Mapping[str, str] = {"bf16": "bfloat16", "f16": "float16"}  # INFERENCE_PRECISION_HINT -> expectation
NO_GROUP = 2**32  # the group size of "per token" is larger; it is not done on a CPU (2026.4)
CODES, UNREADABLE = "u4", "u3"  # what such states read back as: codes, and what nobody made out (2026.4)


class OpenVinoCandidate:
    """An export compiled by OpenVINO; made by `open`.

    A stateful one keeps its past to itself: it goes on from its own last step or starts anew, and nothing else.
    """

    runtime = "openvino"

    def __init__(
        self,
        path: Path,
        interface: Interface,
        settings: Settings,
        arithmetic: Expectation,
        config: Config,
        request: Any,
    ):
        self.path = path
        self.interface = interface
        self.settings = settings
        self._arithmetic = arithmetic
        self._config = config
        self._request = request
        self._last: Past | None = None

    @classmethod
    def open(
        cls, path: str | Path, runtime: str, provider_options: Mapping[str, str], config: Config
    ) -> "OpenVinoCandidate":
        """Opens an export of the checkpoint with this configuration.

        Args:
            path: an `.xml` or `.onnx` file, or a directory that holds one.
            runtime: "openvino".
            provider_options: `device_type` (CPU by default), and properties of OpenVINO, passed on unchanged.
            config: the checkpoint's.

        Raises:
            InputError: the file cannot be used, or is an export of another model.
            RuntimeMissing: OpenVINO is not installed.
            NoVerdict: OpenVINO cannot compile it with these properties.
        """
        file = described(path)
        model = model_of(file.path, config)
        try:
            inputs, outputs = ([declared(port) for port in ports] for ports in (model.inputs, model.outputs))
            interface = interface_of(inputs, outputs, is_stateful=bool(model.get_sinks()))
            # Compiled, a stateful model does not say what it keeps; its file does.
            shown = file.interface if isinstance(file, IrFile) else interface
            check_same_model(shown, config, file.query_heads(shown.resolved(config).head_dim))
        except InputError as error:
            raise InputError(f"{file.path}: {error}") from error
        request, settings = compiled(file.path, model, provider_options, config)
        together = isinstance(file, OnnxFile) and file.rounds_together
        arithmetic = arithmetic_of(settings.effective, together=together)
        return cls(file.path, interface.resolved(config), settings, arithmetic, config, request)

    @property
    def device(self) -> str:
        """That it was compiled for."""
        return self.settings.requested[DEVICE]

    @property
    def fused(self) -> list[list[str]]:
        """Of each operator that it was compiled to: those of the model that it is, by their names."""
        return fused_in(self._request)

    @property
    def can_pad_left(self) -> bool:
        """Whether padding may stand in front of short rows: it is told positions and mask."""
        return self.interface.has_position_ids and self.interface.has_attention_mask and not self.interface.batch_size

    @property
    def can_merge(self) -> bool:
        """Whether its past can be handed over."""
        return not self.interface.is_stateful

    @property
    def expectation(self) -> Expectation:
        """What its settings say that it computes in, and that its cache is."""
        if not self.interface.is_stateful or self.interface.head_dim is None:
            return self._arithmetic
        return joined(self._arithmetic, expectation(self.settings, self.interface.head_dim))

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds new tokens (position -1 is left padding), after `past` if there is one: of a stateful export its last.

        Raises:
            NoVerdict: the export cannot take this batch, OpenVINO fails, or an output has another shape.
        """
        if self.interface.is_stateful and past is not None and past is not self._last:
            raise ValueError("a stateful export goes on from its own last step alone")
        try:
            if past is None:
                self._request.reset_state()
            fed = feed(self.interface, token_ids_BT, positions_BT, past)
            given = {
                name: np.array(array) for port, array in self._request.infer(fed).items() for name in port.get_names()
            }
            check_logits(given["logits"], token_ids_BT.shape, self.interface.vocab_size)
            self._last = next_past(self.interface, given, positions_BT, past) if self.interface.has_cache else None
        except (RuntimeError, NoVerdict) as error:
            raise NoVerdict(f"{self.path}: openvino failed: {in_words(str(error), self._config)}") from error
        if self._last is not None and self._last.fault:
            fault = f"{self.path}: openvino failed: {in_words(self._last.fault, self._config)}"
            self._last = replace(self._last, fault=fault)
        return Step(given["logits"], self._last)

    def model(self) -> Any:
        """A copy of OpenVINO's model of the export, not compiled, to be changed."""
        return self._model.clone()

    @cached_property
    def _model(self) -> Any:
        # Of use to who looks inside alone: what is compiled has weights of its own.
        return model_of(self.path, self._config)

    def reopened(self, model: Any = None, provider_options: Mapping[str, str] | None = None) -> "OpenVinoCandidate":
        """The same export, opened once more as it was, but for what is given.

        Args:
            model: a copy of it that gives more.
            provider_options: in place of those that it was opened with.

        Raises:
            NoVerdict: OpenVINO cannot compile it like that.
        """
        options = self.settings.requested if provider_options is None else provider_options
        request, settings = compiled(self.path, self.model() if model is None else model, options, self._config)
        arithmetic = arithmetic_of(settings.effective, together=self._arithmetic.arithmetic.together)
        return OpenVinoCandidate(self.path, self.interface, settings, arithmetic, self._config, request)

    def caches(self, past: Past) -> dict[str, np.ndarray]:
        """Keys and values after the last step, `x_BKSH` by trace point; codes (uint8) where it shows no more."""
        if not self.interface.is_stateful:
            return caches(self.interface, past)
        precisions = dict(zip("kv", (self.settings.effective.get(name) for name in CACHE_PRECISIONS), strict=True))
        if UNREADABLE in precisions.values():
            return {}
        found = {}
        for state in self._request.query_state():
            if (name := STATE_NAME.match(state.name)) is not None:
                x_BKSH = np.array(state.state.data)
                codes = x_BKSH.astype(np.uint8) if precisions[name[2][0]] == CODES else x_BKSH
                # A version that gives the values that attention reads shows them in place of codes.
                whole = np.array_equal(codes, x_BKSH)
                found[f"layers.{name[1]}.self_attn.{name[2][0]}_cache"] = codes if whole else x_BKSH
        return found


def arithmetic_of(effective: Mapping[str, Any], *, together: bool) -> Expectation:
    """What a model compiled with these properties computes in.

    Inputs of products with weights that are stored as integers become int8, in groups; where the graph itself rounds
    them `together`, they are uint8 by then.
    """
    precision = ARITHMETICS.get(effective.get("INFERENCE_PRECISION_HINT", ""), EXACT.name)
    if together:
        return joined(expectations()[precision], TOGETHER)
    group = int(effective.get("DYNAMIC_QUANTIZATION_GROUP_SIZE", 0))
    if not effective[INTEGER_WEIGHTS] or not 0 < group < NO_GROUP:
        return expectations()[precision]
    return joined(expectations()[precision], int8_activations(group))


def expectation(settings: Settings, head_dim: int) -> Expectation:
    """The reference with the cache that a stateful attention on a CPU has with these settings."""
    precisions = [settings.effective.get(name) for name in CACHE_PRECISIONS]
    if precisions == ["f16", "f16"]:
        if settings.effective.get("INFERENCE_PRECISION_HINT") == "bf16":
            return EXACT  # what is computed in bfloat16 is kept in it
        return expectations()["ov-f16"]
    if settings.requested[DEVICE] != "CPU" or not set(precisions) <= {"u8", "u4"}:
        return EXACT
    key_group, value_group = (int(settings.effective[name]) or head_dim for name in GROUP_SIZES)
    by_channel = settings.requested.get("KEY_CACHE_QUANT_MODE") == "BY_CHANNEL"
    key_bits, value_bits = (8 if precision == "u8" else 4 for precision in precisions)
    scheme = stateful_cache(
        key_bits,
        value_bits,
        key_group=None if by_channel or key_group == head_dim else key_group,
        value_group=None if value_group == head_dim else value_group,
        by_channel=key_group if by_channel else 0,
    )
    named = next((known for known in expectations().values() if known.scheme == scheme), None)
    keys = f"{precisions[0]} keys{' by channel' if by_channel else ''} in groups of {key_group}"
    return named or Expectation(f"{keys}, {precisions[1]} values in groups of {value_group}", scheme)
