"""A candidate once more, with one thing other than it was: unoptimised, on the plain CPU, without its options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from refengine.config import Config
from verify.candidates import Candidate
from verify.candidates.openvino import OpenVinoCandidate
from verify.candidates.ort import OrtCandidate
from verify.candidates.ort_session import Level
from verify.drive import CandidateRun, Rows, run_candidate
from verify.errors import NoVerdict
from verify.schedule import Schedule


@dataclass(frozen=True)
class Setting:
    """How an export is run again.

    Attributes:
        runtime: as `--runtime` takes it.
        options: of the provider.
        level: how far ONNX Runtime may change the graph.
    """

    runtime: str
    options: Mapping[str, str]
    level: Level = "all"


class OfModel(Candidate, Protocol):
    """A candidate that knows the configuration of the checkpoint that it is of."""

    _config: Config


def rerun(
    candidate: OfModel, setting: Setting, prompts: Rows, schedule: Schedule, forced: Rows, use_cache: bool
) -> CandidateRun:
    """Runs the export of a candidate with a setting. Raises NoVerdict when it cannot be."""
    again = _reopened(candidate, setting)
    return run_candidate(again, prompts, schedule, use_cache=use_cache, forced=forced)


def _reopened(candidate: OfModel, setting: Setting) -> Candidate:
    if isinstance(candidate, OrtCandidate):
        return candidate.reopened(runtime=setting.runtime, provider_options=setting.options, level=setting.level)
    if isinstance(candidate, OpenVinoCandidate) and setting.runtime == candidate.runtime:
        return candidate.reopened(provider_options=setting.options)
    if candidate.path.suffix != ".onnx":
        raise NoVerdict(f"{candidate.path}: no ONNX file, which nobody but {candidate.runtime} runs")
    plain = OrtCandidate.open(candidate.path, setting.runtime, setting.options, candidate._config)
    return plain.reopened(level=setting.level)
