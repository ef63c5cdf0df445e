"""The runtimes by name, and how each opens a candidate."""

from collections.abc import Callable, Mapping
from pathlib import Path

from refengine.config import Config
from verify.candidates import Candidate

Open = Callable[[Path, str, Mapping[str, str], Config], Candidate]


def _open_ort(path: Path, runtime: str, provider_options: Mapping[str, str], config: Config) -> Candidate:
    from verify.candidates.ort import OrtCandidate

    return OrtCandidate.open(path, runtime, provider_options, config)


def _open_openvino(path: Path, runtime: str, provider_options: Mapping[str, str], config: Config) -> Candidate:
    from verify.candidates.openvino import OpenVinoCandidate

    return OpenVinoCandidate.open(path, runtime, provider_options, config)


RUNTIMES: Mapping[str, Open] = {"ort-cpu": _open_ort, "ort-openvino": _open_ort, "openvino": _open_openvino}
