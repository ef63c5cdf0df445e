"""The smallest graph that shows a mistake, for a bug report: a few nodes, what they are fed, what is right."""

from pathlib import Path
from typing import Any

import numpy as np

from refengine.errors import InputError
from verify.candidates.cut_onnx import cut_bytes
from verify.contestant import Contestant
from verify.locating.walk import Shown

SCRIPT = """\
import numpy as np
import onnxruntime

arrays = np.load("arrays.npz")
session = onnxruntime.InferenceSession("part.onnx", providers=["{provider}"])
fed = {{value.name: arrays["fed:" + value.name] for value in session.get_inputs()}}
given = session.run(None, fed)[0]
error = np.where(arrays["there"], given - arrays["right"], 0)
print(f"{{session.get_outputs()[0].name}}: largest error {{np.abs(error).max():.3g}}")
print(f"of values up to {{np.abs(arrays['right']).max():.3g}}")
"""


def write_repro(contestant: Contestant, shown: Shown, directory: Path, provider: str) -> None:
    """Writes `part.onnx`, `arrays.npz` and `repro.py`, which needs onnxruntime and numpy only.

    Args:
        contestant: the candidate, open.
        shown: what to cut out of its graph.
        directory: made where it does not exist.
        provider: that the script runs it on.

    Raises:
        InputError: the directory cannot be written.
        NoVerdict: the graph cannot be cut.
    """
    part = contestant.apply(cut_bytes, shown.made, dict(shown.fed), [shown.name])
    fed = {f"fed:{name}": array for name, array in shown.fed.items()}
    arrays: dict[str, Any] = {**fed, "right": shown.right, "there": shown.there}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "part.onnx").write_bytes(part)
        with (directory / "arrays.npz").open("wb") as file:
            np.savez(file, **arrays)
        (directory / "repro.py").write_text(SCRIPT.format(provider=provider), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror}); choose another place") from error
