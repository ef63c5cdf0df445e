"""A candidate once more, with one thing other than it was: unoptimised, on the plain CPU, without its options."""

from collections.abc import Mapping
from dataclasses import dataclass

from verify.candidates.ort import OrtCandidate
from verify.drive import CandidateRun, Rows, run_candidate
from verify.errors import NoVerdict
from verify.schedule import Schedule


@dataclass(frozen=True)
class Setting:
    """How an export is run again.

    Attributes:
        runtime: as `--runtime` takes it.
        options: of the provider.
        optimised: whether the runtime may change the graph.
    """

    runtime: str
    options: Mapping[str, str]
    optimised: bool = True


def rerun(
    candidate: object, setting: Setting, prompts: Rows, schedule: Schedule, forced: Rows, use_cache: bool
) -> CandidateRun:
    """Runs the export of a candidate with a setting. Raises NoVerdict when it cannot be."""
    if not isinstance(candidate, OrtCandidate):
        raise NoVerdict("only ONNX Runtime runs an export with other settings in one process")
    again = candidate.reopened(runtime=setting.runtime, provider_options=setting.options, optimised=setting.optimised)
    return run_candidate(again, prompts, schedule, use_cache=use_cache, forced=forced)
