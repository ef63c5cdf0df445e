"""`python -m verify causes` and `python -m verify explain`: the catalogue, and one of its causes."""

import argparse
from difflib import get_close_matches

from refengine.errors import InputError
from verify.causes.catalogue import CATALOGUE
from verify.causes.pages import page
from verify.report.console import print_explanation, print_facts
from verify.verbs.terminal import show_text

OK = 0


def run_causes(options: argparse.Namespace) -> int:
    """Lists every cause that can be named, each with what is wrong."""
    show_text(lambda console: print_facts([(name, page(name)[0]) for name in CATALOGUE], console))
    return OK


def run_explain(options: argparse.Namespace) -> int:
    """Shows what a cause looks like, why it happens, how it is tested and put right, and where that is known from.

    Raises:
        InputError: there is no cause of that name.
    """
    name = options.cause
    if name not in CATALOGUE:
        near = get_close_matches(name, CATALOGUE, n=3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f'{name!r}: no cause has this name; {meant}"python -m verify causes" lists all of them')
    show_text(lambda console: print_explanation(name, *page(name), console))
    return OK
