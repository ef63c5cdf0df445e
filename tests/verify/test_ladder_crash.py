"""A candidate that does not survive being looked into is located by what it gives anyway."""

from pathlib import Path

import pytest

from tests.verify.caused import small_model
from tests.verify.comparing import Compared, Notes
from tests.verify.faulty import write_faulty
from verify.compare import Comparison
from verify.contestant import Isolated
from verify.find_cause import find_cause
from verify.request import Request
from verify.workers.worker import UNBOUNDED, Bounds

MARGIN = 20e6  # bytes: less than a second session on these weights takes


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Compared:
    """A small model with a large vocabulary."""
    return small_model(tmp_path_factory.mktemp("model"), vocab_size=150_000)


@pytest.fixture(scope="module")
def faulty(compared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("faulty") / "model.onnx"
    return write_faulty(compared.checkpoint, out, config={"rms_norm_eps": 1e-3})


def test_a_candidate_that_is_ended_when_it_is_traced_is_located_by_its_cache(compared, faulty):
    def opened(bounds: Bounds) -> Isolated:
        return Isolated(faulty, "ort-cpu", {}, compared.checkpoint.config, bounds)

    def compare(candidate: Isolated) -> Comparison:
        request = Request(compared.prompts, compared.max_new_tokens, modes=("on",))
        comparison = Comparison(compared.checkpoint, request, Notes(), compared.reference)
        comparison.cells(candidate)
        return comparison

    with opened(UNBOUNDED) as candidate:
        compare(candidate)
        most = candidate.peak_memory
    with opened(Bounds(None, int(most + MARGIN))) as candidate:
        unequal = compare(candidate).unequal
        found = find_cause(compared.checkpoint, None, candidate, unequal, {}, 0.0, Notes())
    assert (found.location.layer, found.location.point, found.location.node) == (0, "self_attn.k_cache", None)
    assert any("could not be looked into" in note and "so it was ended" in note for note in found.notes)
