"""A candidate's run on the reference's tokens, and where it goes wrong, for tests of the location."""

from pathlib import Path

from tests.verify.comparing import Compared, Here
from verify.drive import CandidateRun, run_candidate
from verify.expect import EXACT, Expectation
from verify.locate import Located, locate
from verify.naming.as_if import Passes
from verify.truth.reference import Reference


class Seen:
    """A candidate's run on the reference's tokens, in batches as large as it can take.

    Args:
        compared: the model and the prompts.
        path: the export.
        expectation: what the reference is run with.
        options: of the runtime.
    """

    def __init__(
        self,
        compared: Compared,
        path: Path,
        runtime: str = "ort-cpu",
        expectation: Expectation = EXACT,
        **options: str,
    ):
        candidate = compared.open(path, runtime, options)
        rows = range(len(compared.prompts))
        self.compared = compared
        self.candidate = Here(candidate)
        self.expectation = expectation
        self.reference = compared.reference
        if expectation != EXACT:
            engine = Reference(compared.checkpoint, scheme=expectation.scheme, arithmetic=expectation.arithmetic)
            self.reference = engine.run(compared.prompts, compared.max_new_tokens)
        batches = [tuple(rows)] if candidate.can_pad_left else [(row,) for row in rows]
        use_cache = candidate.interface.has_cache
        self.passes = Passes(compared.prompts, self.reference.tokens, batches, use_cache)
        schedule = [batch for batch in batches for _ in range(compared.max_new_tokens)]
        self.run: CandidateRun = run_candidate(
            candidate, compared.prompts, schedule, use_cache=use_cache, forced=self.reference.tokens
        )

    def located(self) -> Located:
        """Where it goes wrong."""
        checkpoint = self.compared.checkpoint
        return locate(checkpoint, self.candidate, self.run, self.reference, self.passes, self.expectation)
