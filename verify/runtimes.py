"""The runtimes by name, and how each opens a candidate."""

from collections.abc import Callable, Mapping
from pathlib import Path

from refengine.config import Config
from refengine.errors import InputError
from verify.candidates import Candidate
from verify.candidates.ort_session import BY_NAME

Open = Callable[[Path, str, Mapping[str, str], Config], Candidate]


def _open_ort(path: Path, runtime: str, provider_options: Mapping[str, str], config: Config) -> Candidate:
    from verify.candidates.ort import OrtCandidate

    return OrtCandidate.open(path, runtime, provider_options, config)


def _open_openvino(path: Path, runtime: str, provider_options: Mapping[str, str], config: Config) -> Candidate:
    from verify.candidates.openvino import OpenVinoCandidate

    return OpenVinoCandidate.open(path, runtime, provider_options, config)


def _open_genai(path: Path, runtime: str, provider_options: Mapping[str, str], config: Config) -> Candidate:
    from verify.candidates.genai import GenaiCandidate

    return GenaiCandidate.open(path, runtime, provider_options, config)


def _open_transformers(path: Path, runtime: str, provider_options: Mapping[str, str], config: Config) -> Candidate:
    from verify.candidates.transformers import TransformersCandidate

    return TransformersCandidate.open(path, runtime, provider_options, config)


def _open_llama_cpp(path: Path, runtime: str, provider_options: Mapping[str, str], config: Config) -> Candidate:
    from verify.candidates.llama_cpp import LlamaCppCandidate

    return LlamaCppCandidate.open(path, runtime, provider_options, config)


# Of exports that everybody can run; the others need a package of their own, and some of them a file of their own.
USUAL: Mapping[str, Open] = {"ort-cpu": _open_ort, "ort-openvino": _open_ort, "openvino": _open_openvino}
RUNTIMES: Mapping[str, Open] = {
    **USUAL,
    "genai": _open_genai,
    "transformers": _open_transformers,
    "llama.cpp": _open_llama_cpp,
}
SERVER = "openai"  # opens no file: a server is asked, and judged by its record


def runtime_named(name: str) -> Open:
    """How a candidate is opened on a runtime: one of `RUNTIMES`, or "ort:" and the name of a provider of ONNX Runtime.

    Which providers there are is known to the installed ONNX Runtime alone, so it is asked when a candidate is opened.

    Raises:
        InputError: no runtime can have this name.
    """
    if name in RUNTIMES:
        return RUNTIMES[name]
    if name.startswith(BY_NAME) and name != BY_NAME:
        return _open_ort
    raise InputError(
        f"expected {', '.join(RUNTIMES)}, or {BY_NAME} and a provider of ONNX Runtime "
        f"(as in {BY_NAME}CPUExecutionProvider), found {name!r}"
    )
