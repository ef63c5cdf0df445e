"""The smallest graph that shows a mistake, for a bug report: a few nodes, what they are fed, what is right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refengine.errors import InputError
from verify.contestant import Contestant
from verify.locating.flow import Flow
from verify.locating.insight import insight_into
from verify.locating.walk import Shown


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
            (directory / name).write_bytes(content)
        with (directory / "arrays.npz").open("wb") as file:
            np.savez(file, **arrays)
        (directory / "repro.py").write_text(script, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror}); choose another place") from error
