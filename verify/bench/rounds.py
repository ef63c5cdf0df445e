"""The rows of the table, measured in turns."""

import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from refengine.errors import InputError
from refengine.machine import Machine
from verify.bench.decoding import Sample, prepare
from verify.bench.strategies import Task, least_seconds
from verify.errors import NoVerdict
from verify.report.bench import Figures, Row, Spread
from verify.workers.worker import Worker

ROUNDS = 3
ENOUGH = 3.0  # seconds of a row's turns, after which it gets no more


@dataclass
class _Measured:
    """The turns of one row; the first row's are asked for again as long as others are measured."""

    task: Task
    samples: list[Sample] = field(default_factory=list)
    times_first: list[float] = field(default_factory=list)
    reason: str | None = None

    def turn(self, worker: Worker[Callable[[], Sample]]) -> Sample | None:
        """One more, or None when there are none any more because of `reason`."""
        if self.reason is None:
            try:
                self.samples.append(worker.call(operator.call))
                return self.samples[-1]
            except (InputError, NoVerdict) as failed:
                self.reason = str(failed)
        return None

    @property
    def seconds(self) -> float:
        """Of all turns."""
        return sum(sample.seconds for sample in self.samples)


def measure(tasks: Sequence[Task], machine: Machine, on_row: Callable[[Task], None]) -> list[Row]:
    """Measures rows one after another, each in a process of its own; what stops one becomes its reason.

    The first row's process stays, and takes a turn after each turn of another: a machine's speed changes with time, and
    so a ratio is of two turns beside each other. No more than two processes have the model in memory.

    Args:
        tasks: at least one; the ratios of all are to the first.
        machine: for the roofline.
        on_row: told what is about to be measured.
    """
    first, *others = (_Measured(task) for task in tasks)
    on_row(first.task)
    with Worker(prepare, first.task) as standard:
        while _wants_more(first):
            first.turn(standard)
        for row in others:
            on_row(row.task)
            with Worker(prepare, row.task) as worker:
                while _wants_more(row):
                    own, beside = row.turn(worker), first.turn(standard)
                    if own and beside:
                        row.times_first.append(own.tokens_per_second / beside.tokens_per_second)
    first.times_first = [1.0]
    return [_row(row, machine) for row in (first, *others)]


def _wants_more(row: _Measured) -> bool:
    return row.reason is None and len(row.samples) < ROUNDS and row.seconds < ENOUGH


def _row(measured: _Measured, machine: Machine) -> Row:
    task, samples = measured.task, measured.samples
    new_tokens = task.new_tokens
    named = Row(task.engine, task.strategy.name, task.strategy.batch_size, len(new_tokens), sum(new_tokens))
    if measured.reason is not None:
        return replace(named, reason=measured.reason)
    further = [seconds for sample in samples for seconds in sample.further]
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    took = statistics.median(sample.seconds for sample in samples)
    figures = Figures(
        tokens_per_second=statistics.median(sample.tokens_per_second for sample in samples),
        first_token=_spread([seconds for sample in samples for seconds in sample.first]),
        further_token=_spread(further) if further else None,
        peak_bytes=max(peaks, default=None),
        times_first_row=statistics.median(measured.times_first) if measured.times_first else None,
        share_of_roofline=least_seconds(task, machine) / took,
    )
    return replace(named, figures=figures)


def _spread(seconds: Sequence[float]) -> Spread:
    median, p95 = np.percentile(seconds, [50, 95]).tolist()
    return Spread(median, p95)
