"""A seeded fault, run and held against the reference as if each cause in question were in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refengine.checkpoint import Checkpoint, open_checkpoint
from refengine.tokenizer import encode_prompt, load_tokenizer
from refengine.weights import Weights
from tests.verify.comparing import Compared
from tests.verify.conftest import TEXTS, TINY_LLAMA
from verify.candidates.graph_constants import graph_constants
from verify.causes import Cause, Evidence, Family
from verify.drive import run_candidate
from verify.export.faults.writing import Fault
from verify.naming.along import best_of
from verify.naming.as_if import Passes, run_as_if
from verify.naming.counterfactual import Counterfactual
from verify.naming.screen import Screen, Tried
from verify.truth.noise import rms

LONGEST, NEW_TOKENS = 24, 4  # longer than every short table and window that is tried


def trained() -> "Subject":
    """The trained model and English."""
    tokenizer = load_tokenizer(TINY_LLAMA)
    prompts = [encode_prompt(tokenizer, text, chat=False)[:LONGEST] for text in (TEXTS[0], TEXTS[2])]
    return Subject(open_checkpoint(TINY_LLAMA), prompts)


class Subject:
    """A model, a ragged batch of two prompts, and the reference's run of them, with a cache."""

    def __init__(self, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]]) -> None:
        self.compared = Compared(checkpoint, prompts, NEW_TOKENS)
        self.weights, self.weights64 = (Weights.open(checkpoint, dtype) for dtype in (np.float32, np.float64))
        self.passes = Passes(prompts, self.compared.reference.tokens, [(0, 1)], use_cache=True)
        self.bound = self.compared.reference.logits.noise.overall_bound

    def explained(self, fault: Fault, directory: Path) -> "Explained":
        """What the export of a fault gives, and all that is known of it."""
        path = fault.write(self.compared.checkpoint, directory / "model.onnx")
        config, reference, passes = self.compared.checkpoint.config, self.compared.reference, self.passes
        steps = [passes.batches[0]] * NEW_TOKENS
        run = run_candidate(self.compared.open(path), passes.prompts, steps, use_cache=True, forced=reference.tokens)
        evidence = Evidence(
            config,
            use_cache=True,
            is_padded=True,
            longest=LONGEST + NEW_TOKENS - 1,
            suspects=(fault.layers,),
            constants=graph_constants(path, config),
        )
        return Explained(fault, evidence, Screen(self.weights, passes, run, reference, range(2)), self)

    def noise_with(self, mistake: Counterfactual) -> float:
        """The float32 noise of the model with a mistake in it, by that of the right one: 1, or what is more."""
        with_mistake, right = (
            [
                np.concatenate(run_as_if(weights, self.passes, mistakes)).astype(np.float64)
                for weights in (self.weights, self.weights64)
            ]
            for mistakes in ([mistake], [])
        )
        noise, unit = (float(rms(single - double)) for single, double in (with_mistake, right))
        return max(1.0, noise / unit)


@dataclass(frozen=True)
class Explained:
    """The run of one fault."""

    fault: Fault
    evidence: Evidence
    screen: Screen
    subject: Subject

    @property
    def before(self) -> float:
        """The noise ratio against the reference as it is."""
        return self.screen.before

    def tried(self, cause: Cause) -> list[Tried]:
        """All single counterfactuals of a cause, the best first."""
        single = [each for each in cause(self.evidence) if isinstance(each, Counterfactual)]
        return sorted((self.screen.tried(each) for each in single), key=lambda each: each.ratio)

    def searched(self, cause: Cause) -> Tried:
        """The best of a cause's families."""
        families = [each for each in cause(self.evidence) if isinstance(each, Family)]
        nothing = Tried((), self.before)
        return min((best_of(each, self.screen.tried, nothing) for each in families), key=lambda each: each.ratio)

    def without_constants(self) -> "Explained":
        """The same, of an export that says nothing of itself."""
        return replace(self, evidence=replace(self.evidence, constants={}))

    def is_reproduced(self, tried: Tried) -> bool:
        """Whether only noise is left."""
        bound = self.subject.bound
        return tried.ratio <= bound or tried.ratio <= bound * self.subject.noise_with(tried.mistakes[0])

    def reproduced_by(self, causes: Sequence[Cause]) -> list[str]:
        """The names of those causes of which a counterfactual leaves only noise."""
        best = [self.tried(cause)[:1] for cause in causes]
        return [each.mistakes[0].cause for tried in best for each in tried if self.is_reproduced(each)]
