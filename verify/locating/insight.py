"""How a candidate is looked into, whose runtime gives more than its results: of ONNX graphs and of OpenVINO's alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from verify.candidates.cut_ir import files_ir, replay_each_ir, replay_ir
from verify.candidates.cut_onnx import files_onnx, replay, replay_each
from verify.candidates.trace_ir import read_ir, trace_ir
from verify.candidates.trace_onnx import read_onnx, trace_onnx
from verify.candidates.traced import Traced
from verify.contestant import Contestant
from verify.errors import NoVerdict
from verify.locating.flow import Flow

ORT_SCRIPT = """\
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
OPENVINO_SCRIPT = """\
import numpy as np
import openvino

arrays = np.load("arrays.npz")
options = {options}
model = openvino.compile_model("part.xml", options.pop("device_type"), options)
given = model([arrays["fed:" + port.any_name] for port in model.inputs])[0]
error = np.where(arrays["there"], given - arrays["right"], 0)
print(f"{{model.outputs[0].node.friendly_name}}: largest error {{np.abs(error).max():.3g}}")
print(f"of values up to {{np.abs(arrays['right']).max():.3g}}")
"""


@dataclass(frozen=True)
class Insight:
    """How a candidate of one kind is looked into: functions that are run where it is.

    Attributes:
        read: its graph.
        trace: runs it with more of its tensors given.
        replay: runs a few of its nodes alone.
        replay_each: runs each of some nodes alone, where kernels are plain.
        files: those of a model of a few of its nodes, by name.
        script: that runs it, with `provider` and `options` in braces.
    """

    read: Callable[..., Flow]
    trace: Callable[..., Traced]
    replay: Callable[..., dict[str, dict[str, np.ndarray]]]
    replay_each: Callable[..., dict[str, np.ndarray]]
    files: Callable[..., dict[str, bytes]]
    script: str


INSIGHTS: Mapping[str, Insight] = {  # by how the names of runtimes begin
    "ort": Insight(read_onnx, trace_onnx, replay, replay_each, files_onnx, ORT_SCRIPT),
    "openvino": Insight(read_ir, trace_ir, replay_ir, replay_each_ir, files_ir, OPENVINO_SCRIPT),
}


def insight_into(contestant: Contestant) -> Insight:
    """By its runtime. Raises NoVerdict when that cannot be asked for more than it gives."""
    insight = next((each for name, each in INSIGHTS.items() if contestant.runtime.startswith(name)), None)
    if insight is None:
        raise NoVerdict(f"{contestant.runtime} gives nothing but its results")
    return insight
