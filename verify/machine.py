"""This machine, and what a process takes of it."""

import os
import platform
from contextlib import suppress
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np


def machine() -> str:
    """One line: cores and processor, and the versions of what computes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = f"{len(names)} cores of {names[0]}" if names else f"{os.cpu_count()} cores of {platform.processor()}"
    kernels = os.environ.get("OPENBLAS_CORETYPE", "chosen by itself")
    # By the distribution that brings it: there are several, and importing it takes memory.
    brought_by = packages_distributions().get("onnxruntime", [])
    runtime = [f"ONNX Runtime {version(name)}" for name in brought_by[:1]]
    versions = ", ".join([f"Python {platform.python_version()}", f"NumPy {np.__version__}", *runtime])
    return f"{cores}, {versions}, OpenBLAS kernels {kernels}"


def forget_peak() -> None:
    """Has `peak_memory` count anew, where the system can do that (Linux).

    Source: proc_pid_clear_refs(5).
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int | None:
    """The most bytes that this process ever had in memory, or had since `forget_peak`; None where nobody says."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not `ru_maxrss`: on Linux a process that is started inherits that of the one that starts it.
        lines = status.read_text(encoding="utf-8").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def total_memory() -> int:
    """Bytes of this machine's memory."""
    import psutil  # which the environment of a worker need not have

    return int(psutil.virtual_memory().total)
