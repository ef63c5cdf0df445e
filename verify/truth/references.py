"""The reference's runs that a comparison needs: on the checkpoint's weights, and on those that an export holds."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.errors import CheckpointError
from refengine.tokens import Rows
from verify.expect import EXACT, Expectation
from verify.report.weights import WeightsCost
from verify.truth.along_codes import along_codes
from verify.truth.reference import Reference, ReferenceRun, Truth
from verify.weights.cost import cost_of_weights
from verify.weights.exported import ExportedCheckpoint


class References:
    """The reference's runs of some prompts, by expectation; each is made once.

    Args:
        checkpoint: the model.
        own: the weights that an export holds; None where they are not known.
        on_progress: told what is being done.
        exact_run: the run with the checkpoint's weights and nothing else expected, where there is one already.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        own: ExportedCheckpoint | None,
        on_progress: Callable[[str], None],
        exact_run: ReferenceRun | None = None,
    ):
        self.checkpoint = checkpoint
        self.own = own
        self.on_progress = on_progress
        self.truths: dict[Expectation, Truth] = {}
        self.made = {} if exact_run is None else {EXACT: exact_run}

    def run(self, expectation: Expectation, prompts: Rows, max_new_tokens: int, guess: Rows) -> ReferenceRun:
        """The run with these weights, cache and arithmetic; as `Reference.run` makes it.

        Raises:
            CheckpointError: weights are not all finite.
        """
        if expectation not in self.made:
            truth = self._truth(expectation, prompts, max_new_tokens, guess)
            self.made[expectation] = self._engine(expectation).with_noise(truth)
        return self.made[expectation]

    def tokens(self, expectation: Expectation, prompts: Rows, max_new_tokens: int, guess: Rows) -> Rows:
        """Those of `run`, whose noise may not be asked for."""
        if expectation in self.made:
            return self.made[expectation].tokens
        return self._truth(expectation, prompts, max_new_tokens, guess).tokens

    def along(self, expectation: Expectation, caches: Mapping[str, Sequence[np.ndarray]]) -> ReferenceRun | None:
        """After `tokens`, with the codes of another's cache; as `along_codes` makes it."""
        if expectation not in self.truths:
            return None
        return along_codes(self._engine(expectation), self.truths[expectation], caches)

    def _truth(self, expectation: Expectation, prompts: Rows, max_new_tokens: int, guess: Rows) -> Truth:
        if expectation not in self.truths:
            self.truths[expectation] = self._engine(expectation).truth(prompts, max_new_tokens, guess)
        return self.truths[expectation]

    def _engine(self, expectation: Expectation) -> Reference:
        checkpoint = self.own if expectation.own_weights and self.own is not None else self.checkpoint
        return Reference(checkpoint, self.on_progress, expectation.scheme, expectation.arithmetic)

    def cost_of_weights(self) -> WeightsCost | None:
        """What the export's own weights cost, with the cache of the first run on the checkpoint's.

        None where they are the checkpoint's or not all finite, or where nothing ran.
        """
        held = next((held for held in {**self.made, **self.truths} if not held.own_weights), None)
        if held is None or self.own is None or self.own.is_exact:
            return None
        self.on_progress("what the export's weights cost")
        try:
            if held not in self.made:
                self.made[held] = self._engine(held).with_noise(self.truths[held])
            return cost_of_weights(self.made[held], self.own, held.scheme)
        except CheckpointError:
            return None
