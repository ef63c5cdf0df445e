"""Exports on ONNX Runtime: on its own CPU provider, on OpenVINO's, or on any other that is installed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Past, Settings, Step
from verify.candidates.explain import in_words
from verify.candidates.onnx_file import OnnxFile, describe
from verify.candidates.ort_session import (
    CPU,
    OPENVINO,
    Level,
    errors,
    open_session,
    openvino_precision,
    provider_of,
    refuse_idle_provider,
)
from verify.errors import NoVerdict
from verify.expect import EXACT, TOGETHER, Expectation, expectations, int8_activations, joined
from verify.feeds import caches, check_logits, feed, next_past
from verify.interface import Interface, check_halves, check_same_model, interface_of

GROUPED_QUERY = "com.microsoft.GroupQueryAttention"
REUSED = "attempting to re-use buffer"  # what a run fails with where declared shapes are not those that come


@dataclass(frozen=True)
class _Opened:
    """A file of an export, and the session that runs it."""

    file: OnnxFile
    interface: Interface
    session: Any


class OrtCandidate:
    """An ONNX export in ONNX Runtime; made by `open`.

    Most are one file in one session. Older ones are two: one reads prompts, the other goes on from their past.
    """

    can_merge = True

    def __init__(self, runtime: str, opened: Sequence[_Opened], settings: Settings, config: Config):
        self.runtime = runtime
        self.file = opened[0].file
        self.path = self.file.path
        self.interface = opened[-1].interface
        self.settings = settings
        self._config = config
        self._opened = opened

    @classmethod
    def open(
        cls, path: str | Path, runtime: str, provider_options: Mapping[str, str], config: Config
    ) -> "OrtCandidate":
        """Opens an export of the checkpoint with this configuration.

        Args:
            path: an `.onnx` file, or a directory that holds one.
            runtime: "ort-cpu", "ort-openvino", or "ort:" and the name of a provider.
            provider_options: passed on unchanged; for OpenVINO `device_type` is CPU unless it is among them.
            config: the checkpoint's.

        Raises:
            InputError: the file cannot be used, or is an export of another model.
            RuntimeMissing: ONNX Runtime, or the provider, is not installed.
            NoVerdict: ONNX Runtime cannot open it, or the provider would run none of it.
        """
        file = describe(path)
        files = [file] if file.with_past is None else [file, file.with_past]
        interfaces = [_interface(one, config) for one in files]
        if len(files) > 1:
            check_halves(*interfaces)

        def opened(reuse_memory: bool) -> "OrtCandidate":
            sessions = [
                open_session(one, runtime, provider_options, config, reuse_memory=reuse_memory) for one in files
            ]
            for _, settings in sessions:
                refuse_idle_provider(runtime, settings)
            parts = [
                _Opened(one, interface, session)
                for one, interface, (session, _) in zip(files, interfaces, sessions, strict=True)
            ]
            return cls(runtime, parts, _together([settings for _, settings in sessions]), config)

        candidate = opened(reuse_memory=True)
        return candidate if candidate._may_reuse_memory() else opened(reuse_memory=False)

    @property
    def expectation(self) -> Expectation:
        """What its graph asks for, and of OpenVINO its options.

        A graph may compute in float16, and ask that inputs of products with quantised weights become int8, as ONNX
        Runtime's own kernels do; where it rounds them to uint8 itself, any provider has to.
        """
        known, provider = expectations(), provider_of(self.runtime)[0]
        precision = openvino_precision(self.settings.requested) if provider == OPENVINO else None
        narrow = known[precision or ("float16" if self.file.product_dtype == "float16" else EXACT.name)]
        block = self.file.int8_block
        if self.file.rounds_together:
            return joined(narrow, TOGETHER)
        return joined(narrow, int8_activations(block)) if provider == CPU and block else narrow

    @property
    def can_pad_left(self) -> bool:
        """Whether padding may stand in front of short rows: it is fed positions and mask and goes by them."""
        return all(
            one.interface.has_position_ids
            and one.interface.has_attention_mask
            and one.interface.batch_size is None
            # It takes the mask's sum for a length, so it reads any padding as standing behind.
            and GROUPED_QUERY not in one.file.operators
            for one in self._opened
        )

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds new tokens (position -1 is left padding), after `past` if there is one.

        Returns:
            Logits of every new token, or of the last alone where the export gives no others.

        Raises:
            NoVerdict: the export cannot take this batch, the runtime fails, or an output has another shape.
        """
        if (positions_BT < 0).any() and not self.can_pad_left:
            raise NoVerdict(
                f"{self.path}: this export cannot be fed left padding; compare one prompt at a time (--batch-size 1)"
            )
        names = ["logits", *(name_out for _, name_out in self.interface.carried)]
        used = self._opened[0 if past is None else -1]
        failures: tuple[type[Exception], ...] = (NoVerdict, *errors())
        try:
            fed = feed(used.interface, token_ids_BT, positions_BT, past)
            given = dict(zip(names, used.session.run(names, fed), strict=True))
            check_logits(given["logits"], token_ids_BT.shape, self.interface.vocab_size)
            kept = next_past(self.interface, given, positions_BT, past) if self.interface.has_cache else None
        except failures as error:
            words = in_words(str(error), self._config)
            raise NoVerdict(f"{used.file.path}: {self.runtime} failed: {words}") from error
        if kept is not None and kept.fault:
            kept = replace(kept, fault=f"{used.file.path}: {self.runtime} failed: {in_words(kept.fault, self._config)}")
        return Step(np.array(given["logits"]), kept)

    def caches(self, past: Past) -> dict[str, np.ndarray]:
        """Keys and values that the last step gave, `x_BKSH` by trace point."""
        return caches(self.interface, past)

    def reopened(
        self,
        sources: Sequence[Path | bytes] = (),
        runtime: str | None = None,
        provider_options: Mapping[str, str] | None = None,
        *,
        level: Level = "all",
    ) -> "OrtCandidate":
        """The same export, opened once more as it was, but for what is given.

        Args:
            sources: for each of its graphs a copy, or the bytes of one, whose weights lie beside the export; or two,
                of which the second goes on from a past, of one graph that does both.
            runtime: another one, with `provider_options`.
            level: how far ONNX Runtime may change the graphs.

        Raises:
            NoVerdict: it cannot be opened like that.
        """
        options = self.settings.requested if runtime is None else provider_options or {}
        reuse = "enable_mem_reuse" not in self.settings.effective.get("session", {})
        runtime = runtime or self.runtime
        opened, told = [], []
        used: Sequence[Path | bytes | None] = sources or [None] * len(self._opened)
        graphs = self._opened if len(used) == len(self._opened) else [self._opened[0]] * len(used)
        for one, source in zip(graphs, used, strict=True):
            session, settings = open_session(
                one.file, runtime, options, self._config, reuse_memory=reuse, source=source, level=level
            )
            opened.append(replace(one, session=session))
            told.append(settings)
        return OrtCandidate(runtime, opened, _together(told), self._config)

    def with_session(self, wrap: Callable[[Any], Any]) -> "OrtCandidate":
        """The same with another session around its own."""
        opened = [replace(one, session=wrap(one.session)) for one in self._opened]
        return OrtCandidate(self.runtime, opened, self.settings, self._config)

    def _may_reuse_memory(self) -> bool:
        """Whether a cached step works, of what is known to fail otherwise.

        The model builder's float16 for CPUs declares the repeated keys and values as long as the new tokens, which
        they are in a first pass alone; ONNX Runtime sees it when it comes to use their memory again.
        """
        if self.interface.cache_dtype != "float16":
            return True
        rows = self.interface.batch_size or 1
        try:
            first = self.run(np.zeros((rows, 2), np.int64), np.tile([0, 1], (rows, 1)))
            self.run(np.zeros((rows, 1), np.int64), np.full((rows, 1), 2), first.past)
        except NoVerdict as error:
            return REUSED not in str(error.__cause__)
        return True


def _interface(file: OnnxFile, config: Config) -> Interface:
    try:
        interface = interface_of(file.inputs, file.outputs)
        check_same_model(interface, config, file.query_heads(interface.resolved(config).head_dim))
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from error
    return interface.resolved(config)


def _together(settings: Sequence[Settings]) -> Settings:
    """What there is to say of all sessions: that of the first, and under "with_past" what the other one does."""
    first, *others = settings
    later = {"with_past": others[0].effective} if others else {}
    return replace(first, effective={**first.effective, **later})
