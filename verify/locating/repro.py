"""The smallest graph that shows a mistake, for a bug report: a few nodes, what they are fed, what is right."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refengine.errors import InputError
from verify.contestant import Contestant
from verify.files import replacing
from verify.locating.findings import Shown
from verify.locating.flow import Flow
from verify.locating.insight import insight_into

SCRIPT = "repro.py"


def whole_part(flow: Flow, places: Sequence[int], name: str, right: Mapping[str, np.ndarray]) -> Shown:
    """The nodes of a part that lead to a tensor, whose mistake shows only as long as none of them are looked at.

    Args:
        flow: the graph.
        places: of the nodes.
        name: of what they make wrongly.
        right: what they were fed and gave when it was right.
    """
    nodes = [flow.nodes[place] for place in sorted(flow.before([name]) & set(places))]
    made = tuple(each for node in nodes for each in node.outputs if each)
    read = {each for node in nodes for each in node.inputs} - set(made)
    fed = {each: right[each] for each in sorted(read) if each in right}
    return Shown(name, made, fed, right[name].astype(np.float64), np.ones(right[name].shape, bool))


def check_repro_place(directory: Path) -> None:
    """Raises InputError when nothing can be written there, or what is there is not of an earlier such graph."""
    above = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    if not above.is_dir():
        raise InputError(f"{directory}: expected a new or empty directory, found the file {above}; choose another name")
    if not os.access(above, os.W_OK):
        raise InputError(f"{directory}: {above} cannot be written to; choose another place")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / SCRIPT).is_file():
        raise InputError(
            f"{directory}: expected a new or empty directory, found other files there; choose another name"
        )


def write_repro(contestant: Contestant, shown: Shown, directory: Path, provider: str) -> None:
    """Writes a model of a part of the graph, `arrays.npz` and `repro.py`, which needs the runtime and numpy only.

    Args:
        contestant: the candidate, open.
        shown: what to cut out of its graph.
        directory: made where it does not exist.
        provider: that the script runs it on, of ONNX Runtime; of OpenVINO it is the device that the candidate has.

    Raises:
        InputError: the directory cannot be written.
        NoVerdict: the graph cannot be cut.
    """
    insight = insight_into(contestant)
    files = contestant.apply(insight.files, shown.made, dict(shown.fed), [shown.name])
    script = insight.script.format(provider=provider, options=dict(contestant.settings.requested))
    fed = {f"fed:{name}": array for name, array in shown.fed.items()}
    arrays: dict[str, Any] = {**fed, "right": shown.right, "there": shown.there}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(directory / name) as unfinished:
                unfinished.write_bytes(content)
        with replacing(directory / "arrays.npz") as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)
        with replacing(directory / SCRIPT) as unfinished:
            unfinished.write_text(script, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror}); choose another place") from error
