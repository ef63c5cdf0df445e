"""Work in processes of their own: what they return, and how they end."""

import ctypes
import importlib
import operator
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from refengine.checkpoint import open_checkpoint
from refengine.errors import InputError
from tests.verify.commands import ROOT, environment, verify
from verify.errors import NoVerdict
from verify.workers.worker import Bounds, Worker, WorkerFailed

EXPORTS = ROOT / "fixtures" / "exports"
TINY_LLAMA = ROOT / "fixtures" / "tiny_llama"
FOREVER = 10**6  # seconds that a hang lasts; no test waits for it


def counted(start: int, steps: int, on_step=None) -> int:
    for _ in range(steps):
        on_step(1)
    return start + steps


def refuse(error: type[Exception]) -> None:
    raise error("expected this, found that")


def test_arrays_come_back_as_they_were_whatever_holds_them():
    arrays = {
        "floats": np.arange(100_000, dtype=np.float32).reshape(100, 1000),
        "turned": np.arange(12.0).reshape(3, 4).T,
        "empty": np.zeros((0, 7), np.int8),
        "rows": [np.arange(3), np.arange(2)],
    }
    with Worker(dict, arrays) as worker:
        back = worker.call(operator.methodcaller("copy"))
    np.testing.assert_equal(back, arrays)
    assert back["floats"].dtype == np.float32
    back["floats"][0, 0] = 1.0  # it is the caller's own


def test_what_a_worker_made_is_kept_from_call_to_call():
    with Worker(list, [1]) as worker:
        worker.call(operator.methodcaller("append", 2))
        assert worker.call(list) == [1, 2]


def test_steps_are_heard_while_a_call_goes_on():
    heard: list[int] = []
    with Worker(int, 5) as worker:
        assert worker.call(counted, 3, on_step=heard.append) == 8
    assert heard == [1, 1, 1]


def test_what_a_worker_writes_is_kept_and_not_shown(capfd):
    with Worker(int) as worker:
        worker.call(write_twice)
        assert worker.said == ("from Python", "from native code")
    assert capfd.readouterr() == ("", "")


def write_twice(number: int) -> None:
    print("from Python", flush=True)
    os.write(2, b"from native code\n")


def test_a_worker_leaves_an_interrupt_to_the_process_that_started_it():
    before = signal.getsignal(signal.SIGINT)
    with Worker(partial, signal.raise_signal, signal.SIGINT) as worker:
        assert worker.call(operator.call) is None
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(partial, os._exit, 3), "its process ended with exit code 3"),
        (partial(partial, os.abort), f"its process ended with signal {signal.SIGABRT.value} ("),
        (partial(partial, ctypes.string_at, 0), f"its process ended with signal {signal.SIGSEGV.value} ("),
        (partial(partial, signal.raise_signal, signal.SIGKILL), "its process was killed (signal 9), as a system"),
        (partial(partial, os.kill, 0, -1), "its process ended with exit code 1: OSError: "),
        (partial(int, "no number"), "its process ended with exit code 1: ValueError: invalid literal for int()"),
        (partial(partial, refuse, NoVerdict), "expected this, found that"),
    ],
    ids=["exits", "aborts", "crashes", "is killed", "raises", "cannot be made", "gives no verdict"],
)
def test_a_worker_that_dies_or_raises_gives_its_reason_in_one_line(make, reason, capfd):
    with Worker(make) as worker, pytest.raises(WorkerFailed) as failed:
        worker.call(operator.call)
    assert str(failed.value).startswith(reason)
    assert "\n" not in str(failed.value)
    assert capfd.readouterr() == ("", "")


def test_bad_input_stays_bad_input():
    with Worker(open_checkpoint, "nowhere") as worker, pytest.raises(InputError, match=r"^nowhere: no such file"):
        worker.call(str)


def test_a_worker_that_refused_a_call_takes_the_next_one():
    with Worker(int, 7) as worker:
        with pytest.raises(WorkerFailed):
            worker.call(refused)
        assert worker.call(str) == "7"


def refused(number: int) -> None:
    refuse(NoVerdict)


def test_a_worker_that_hangs_is_ended_and_says_how_long_it_was_silent():
    with Worker(partial, time.sleep, FOREVER, bounds=Bounds(seconds=0.5)) as worker:
        with pytest.raises(WorkerFailed, match=r"^nothing was heard of its process for \d+ seconds, so it was ended$"):
            worker.call(operator.call)
        assert not worker.is_alive


def test_a_worker_that_takes_too_much_memory_is_ended_and_its_peak_is_known():
    bounds = Bounds(memory=300_000_000)
    with Worker(partial, grow, bounds=bounds) as worker:
        with pytest.raises(WorkerFailed, match=r"^its process had .* GB in memory, more than the 0.3 GB allowed"):
            worker.call(operator.call)
        assert worker.peak_memory > 300_000_000


def grow() -> None:
    kept = []
    while True:
        kept.append(b"\x01" * 10_000_000)


def test_a_process_that_a_worker_has_forked_neither_hides_its_end_nor_outlives_it():
    with Worker(partial, fork_and_crash) as worker:
        with pytest.raises(WorkerFailed, match="signal 6"):
            worker.call(operator.call)
        forked = psutil.Process(int(worker.said[0]))
    psutil.wait_procs([forked], timeout=10)
    assert not forked.is_running() or forked.status() == psutil.STATUS_ZOMBIE  # nobody may have waited for it


def fork_and_crash() -> None:
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(1, f"{os.getpid()}\n".encode())
        os.close(writing)
        time.sleep(FOREVER)
    os.close(writing)
    os.read(reading, 1)  # until the other has written
    os.abort()


def test_a_worker_ends_with_the_process_that_started_it_however_that_ends():
    program = (
        "import os, signal, sys, time; from functools import partial; import operator, psutil\n"
        "from verify.workers.worker import Worker\n"
        "with Worker(int) as worker:\n"
        "    worker.call(str); print(psutil.Process().children()[0].pid, flush=True); sys.stdin.read(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as started:
        worker = psutil.Process(int(started.stdout.readline()))
        started.stdin.write(b"\n")
        started.stdin.flush()
        assert started.wait() == -signal.SIGKILL
        gone, _ = psutil.wait_procs([worker], timeout=30)
    assert gone


def test_another_interpreter_is_used_with_these_very_packages():
    other = Path(sys.prefix, "bin", "python")  # by another name, so that nothing of this process is handed over
    with Worker(importlib.import_module, "verify", python=other) as worker:
        assert worker.call(operator.attrgetter("__file__")) == str(ROOT / "verify" / "__init__.py")


def test_an_interpreter_that_lacks_a_package_says_which(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with (
        pytest.raises(WorkerFailed, match=r"ModuleNotFoundError: No module named '\w+'; its environment needs numpy, "),
        Worker(int, python=tmp_path / "bare" / "bin" / "python"),
    ):
        pass


def test_what_is_no_interpreter_is_refused_in_one_line(tmp_path):
    (tmp_path / "python").write_text("no program")
    with (
        pytest.raises(WorkerFailed, match=r"cannot be run \(.*\); expected a Python interpreter$"),
        Worker(int, python=tmp_path / "python"),
    ):
        pass


def test_a_runtime_that_crashes_gives_cells_that_name_the_signal():
    u4_keys_by_channel = ("KV_CACHE_PRECISION=u4", "KEY_CACHE_QUANT_MODE=BY_CHANNEL", "INFERENCE_PRECISION_HINT=f32")
    options = [part for option in u4_keys_by_channel for part in ("--provider-option", option)]
    done = verify(
        *("compare", TINY_LLAMA, EXPORTS / "optimum-intel", "--runtime", "openvino", *options),
        *("--cache", "on", "--prompt", "A class definition is", "--max-new-tokens", 2),
    )
    assert done.code == 3
    assert done.first_lines[1].startswith("cause: its process ended with signal ")


def test_a_cell_that_runs_into_a_limit_leaves_the_others_their_verdicts(small):
    done = small.compare("--memory-limit", "0.001")
    assert done.code == 3
    assert "more than the 0.001 GB allowed" in done.out


def test_an_interrupted_comparison_leaves_no_process_behind(small):
    # Whoever runs the tests in the background has them ignore interrupts, and what they start too.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from verify.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "compare", small.checkpoint, small.export, "--runtime", "ort-cpu"]
    with subprocess.Popen(
        [*map(str, command), "--prompts", str(small.prompts), "--max-new-tokens", "50"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as started:
        own = psutil.Process(started.pid)
        while not (workers := own.children()):
            assert started.poll() is None
        started.send_signal(signal.SIGINT)
        assert started.wait() == 130
        gone, _ = psutil.wait_procs(workers, timeout=30)
    assert gone == workers
