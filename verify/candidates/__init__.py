"""Candidates: implementations to be compared with the reference. One file a runtime, and no other file imports it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from verify.expect import Expectation
from verify.interface import Interface


@dataclass(frozen=True)
class Settings:
    """What was asked of a runtime, and what it says that it did."""

    requested: Mapping[str, str] = field(default_factory=dict)
    effective: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Past:
    """What a candidate's step hands to the next one: its arrays by input name, and the position of each slot.

    Where no step can go on from it, `fault` says why, and there are no arrays.
    """

    arrays: Mapping[str, np.ndarray]
    positions_BS: np.ndarray
    fault: str = ""


@dataclass(frozen=True)
class Step:
    """What one run of a candidate gave: its own copies, in the dtype that it computes.

    `past` is None without a cache.
    """

    logits_BTV: np.ndarray
    past: Past | None


class Opened(Protocol):
    """What there is to know of an exported model that a runtime has opened."""

    runtime: str
    path: Path
    interface: Interface
    settings: Settings

    @property
    def expectation(self) -> Expectation:
        """What its own settings say that it computes."""

    @property
    def can_pad_left(self) -> bool:
        """Whether ragged rows can be fed together: padding in front, and in a past that rows join and leave."""

    @property
    def can_merge(self) -> bool:
        """Whether its past is handed over, so that rows can join and leave."""


class Candidate(Opened, Protocol):
    """One exported model on one runtime, opened and ready."""

    def run(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray, past: Past | None = None) -> Step:
        """Feeds new tokens (position -1 is left padding), after `past` if there is one.

        Raises NoVerdict when the runtime fails.
        """

    def caches(self, past: Past) -> Mapping[str, np.ndarray]:
        """Keys and values after the last step, `x_BKSH` by trace point; none that the runtime does not show."""


@dataclass(frozen=True)
class Traits:
    """The attributes of `Opened`, to be handed from process to process."""

    runtime: str
    path: Path
    interface: Interface
    settings: Settings
    expectation: Expectation
    can_pad_left: bool
    can_merge: bool

    @classmethod
    def of(cls, opened: Opened) -> "Traits":
        """Those of an opened model."""
        return cls(
            opened.runtime,
            opened.path,
            opened.interface,
            opened.settings,
            opened.expectation,
            opened.can_pad_left,
            opened.can_merge,
        )
