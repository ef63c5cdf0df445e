"""Seeded faults of every family: each is reproduced by its own counterfactual, and by no other one."""

import pytest

from verify.causes import attention, norm_mlp, rope
from verify.causes.catalogue import CATALOGUE, name_of
from verify.export.faults import attention as attention_faults
from verify.export.faults import norm_mlp as norm_mlp_faults
from verify.export.faults import rope as rope_faults

pytestmark = pytest.mark.slow

# Causes, faults, and how many times the bound every fault's effect is: of epsilons, some are small.
FAMILIES = {
    "rope": (rope.CAUSES, rope_faults.FAULTS, 3),
    "attention": (attention.CAUSES, attention_faults.FAULTS, 3),
    "norm_mlp": (norm_mlp.CAUSES, norm_mlp_faults.FAULTS, 1),
}
CASES = [
    pytest.param(causes, faults, fault, effect, id=fault.name)
    for causes, faults, effect in FAMILIES.values()
    for fault in faults
]


@pytest.mark.parametrize(("causes", "faults", "fault", "effect"), CASES)
def test_a_fault_is_reproduced_by_its_cause_alone(subject, causes, faults, fault, effect, tmp_path):
    explained = subject.explained(fault, tmp_path)
    assert explained.before > effect * subject.bound
    # Against all of the family once for each cause: the others are the same mistake elsewhere, or a little more of it.
    is_first = fault is next(other for other in faults if other.cause == fault.cause)
    assert explained.reproduced_by(causes if is_first else [CATALOGUE[fault.cause]]) == [fault.cause]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cause_has_a_fault_in_all_layers_and_one_in_a_single_one(family):
    causes, faults, _ = FAMILIES[family]
    everywhere = {fault.cause for fault in faults if fault.layers is None}
    alone = {fault.cause for fault in faults if fault.layers is not None}
    assert everywhere == alone == {name_of(cause) for cause in causes}
