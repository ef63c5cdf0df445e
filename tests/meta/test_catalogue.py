"""The catalogue as `causes` lists it and `explain` shows it."""

import inspect
import re

import pytest

from tests.verify.commands import verify
from verify.causes.catalogue import CATALOGUE

SECTIONS = ["Seen", "Why", "Test", "Fix", "Source"]


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_cause_says_what_is_wrong_and_then_its_five_sections(name):
    first, *rest = inspect.getdoc(CATALOGUE[name]).splitlines()
    assert first.endswith(".")
    assert not rest[0]
    assert re.findall(r"^(\w+): \S", "\n".join(rest), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("name", CATALOGUE)
def test_explain_shows_every_section_of_a_cause(name):
    done = verify("explain", name)
    assert done.code == 0
    assert done.out.startswith(f"{name}: ")
    assert [line.split()[0] for line in done.out.splitlines() if line.startswith(tuple(SECTIONS))] == SECTIONS


def test_causes_lists_all_of_them():
    done = verify("causes")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines() if not line.startswith(" ")] == list(CATALOGUE)


@pytest.mark.parametrize(("asked", "meant"), [("rope_theta", "rope-theta"), ("norm-epsilon", "norm-eps")])
def test_an_unknown_cause_is_refused_with_those_of_a_similar_name(asked, meant):
    done = verify("explain", asked)
    assert (done.code, done.out) == (2, "")
    assert meant in done.err
    assert "python -m verify causes" in done.err
    assert done.err.count("\n") == 1


def test_a_name_like_no_other_is_refused_without_a_guess():
    done = verify("explain", "zzzz")
    assert done.code == 2
    assert "did you mean" not in done.err
