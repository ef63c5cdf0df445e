"""`python -m verify inspect`: from the options of the command line to its exit code."""

import argparse

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from verify.inspection import facts, inspect, inspect_weights
from verify.report.console import print_facts
from verify.report.weights import weights_as_json
from verify.report.weights_console import print_weights
from verify.verbs.terminal import check_json_place, deliver_text, show_text

FAITHFUL, UNFAITHFUL = 0, 1


def run_inspect(options: argparse.Namespace) -> int:
    """Shows what an export is, or with a checkpoint what became of its tensors; 1 when one is not as it should be.

    Raises:
        InputError: a file cannot be used, or options do not go together.
        NoVerdict: a package is missing, or the runtime cannot open the export.
    """
    if options.model is None:
        if options.json is not None:
            raise InputError("--json: expected MODEL and CANDIDATE, found CANDIDATE alone; give the checkpoint too")
        found = facts(inspect(options.candidate, options.runtime))
        show_text(lambda console: print_facts(found, console))
        return FAITHFUL
    if options.runtime is not None:
        raise InputError("--runtime: weights are read without a runtime; leave out MODEL, or --runtime")
    check_json_place(options.json)
    report = inspect_weights(open_checkpoint(options.model), options.candidate)
    deliver_text(lambda console: print_weights(report, console), weights_as_json(report), options.json)
    return FAITHFUL if report.is_faithful else UNFAITHFUL
