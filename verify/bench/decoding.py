"""One row of the table, decoded and timed: what runs in a process of its own."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from refengine.batching import CONTINUOUS, Batching, NewToken, complete
from refengine.checkpoint import open_checkpoint
from refengine.generate import new_cache
from refengine.kvcache import NO_CACHE
from refengine.model import forward
from refengine.quant import scheme_named
from refengine.requests import Limits
from refengine.weights import Weights
from verify.bench.strategies import PROMPT_LENGTH, Strategy, Task
from verify.candidates import Candidate, Past
from verify.drive import run_candidate
from verify.errors import NoVerdict
from verify.machine import forget_peak, peak_memory
from verify.runtimes import runtime_named
from verify.schedule import joining_and_leaving

Pass = Callable[[np.ndarray, np.ndarray], np.ndarray]  # token_ids_BT, positions_BT -> logits_BV of the last token
WARM_UP = 2  # new tokens


@dataclass(frozen=True)
class Sample:
    """One turn: all requests of a row.

    Attributes:
        tokens: new ones, of all requests together.
        seconds: from the prompts to the last of them.
        first: seconds from then to each request's first token (one figure where they come together).
        further: seconds from each token to the next of the same request (likewise).
        peak_bytes: the most that the process had in memory; since it was ready, where the system can tell.
    """

    tokens: int
    seconds: float
    first: tuple[float, ...]
    further: tuple[float, ...]
    peak_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.tokens / self.seconds


def prepare(task: Task) -> Callable[[], Sample]:
    """Opens what a row needs and warms it up; each call of what it returns is a turn.

    Raises:
        InputError: the checkpoint or the export cannot be used.
        NoVerdict: the runtime is missing, or cannot open or run the export in this way.
    """
    new_tokens, strategy = task.new_tokens, task.strategy
    random = np.random.default_rng(0)
    prompts_RT = random.integers(0, task.config.vocab_size, (len(new_tokens), PROMPT_LENGTH))
    turn: Callable[[Sequence[int]], Sample]
    if task.candidate is not None and strategy.continuous:
        turn = partial(_joining_turn, _opened(task, task.candidate), strategy.batch_size, prompts_RT)
    elif task.candidate is not None:
        begin = partial(candidate_pass, _opened(task, task.candidate), strategy.cached)
        turn = partial(_batch_turn, begin, prompts_RT, strategy.cached)
    else:
        weights = Weights.open(open_checkpoint(task.model))
        if strategy.continuous:
            turn = partial(_continuous_turn, weights, strategy, prompts_RT)
        else:
            turn = partial(_batch_turn, partial(reference_pass, weights, strategy), prompts_RT, strategy.cached)
    forget_peak()
    turn([min(tokens, WARM_UP) for tokens in new_tokens])
    return partial(turn, new_tokens)


def decode(run: Pass, prompts_BT: np.ndarray, cached: bool) -> Iterator[np.ndarray]:
    """Greedy tokens without end, those of all rows at each step: one loop for all engines, so that it favours none.

    Args:
        run: an engine at the start of a sequence.
        prompts_BT: of the same length, so that nothing is padded.
        cached: feed the new token alone; otherwise the whole sequence at each step.
    """
    token_ids_BT = prompts_BT
    positions_BT = np.tile(np.arange(prompts_BT.shape[1]), (len(prompts_BT), 1))
    while True:
        chosen_B1 = run(token_ids_BT, positions_BT).argmax(axis=-1)[:, None]
        yield chosen_B1[:, 0]
        kept = slice(0) if cached else slice(None)
        token_ids_BT = np.append(token_ids_BT[:, kept], chosen_B1, axis=1)
        positions_BT = np.append(positions_BT[:, kept], positions_BT[:, -1:] + 1, axis=1)


def reference_pass(weights: Weights, strategy: Strategy) -> Pass:
    """The reference engine at the start of a sequence."""
    scheme = scheme_named(strategy.scheme)
    cache = new_cache(weights, strategy.batch_size, scheme) if strategy.cached else NO_CACHE
    return lambda token_ids_BT, positions_BT: forward(weights, token_ids_BT, positions_BT, cache, last=True)[:, -1]


def candidate_pass(candidate: Candidate, cached: bool) -> Pass:
    """A candidate at the start of a sequence."""
    past: Past | None = None

    def run(token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
        nonlocal past
        step = candidate.run(token_ids_BT, positions_BT, past)
        past = step.past if cached else None
        return step.logits_BTV[:, -1]

    return run


def _opened(task: Task, export: Path) -> Candidate:
    candidate = runtime_named(task.engine)(export, task.engine, {}, task.config)
    if task.strategy.cached and not candidate.interface.has_cache:
        raise NoVerdict(f"{candidate.path}: the export has no past_key_values input, so it has no cache to decode with")
    if task.strategy.continuous and not (candidate.can_merge and candidate.can_pad_left):
        raise NoVerdict(f"{candidate.path}: rows cannot join and leave a batch of this export's")
    return candidate


def _batch_turn(begin: Callable[[], Pass], prompts_BT: np.ndarray, cached: bool, new_tokens: Sequence[int]) -> Sample:
    steps = decode(begin(), prompts_BT, cached)
    times = [time.perf_counter()]
    for _ in range(new_tokens[0]):  # the same for all
        next(steps)
        times.append(time.perf_counter())
    first, *further = np.diff(times).tolist()
    return Sample(sum(new_tokens), times[-1] - times[0], (first,), tuple(further), peak_memory())


def _joining_turn(candidate: Candidate, batch_size: int, prompts_RT: np.ndarray, new_tokens: Sequence[int]) -> Sample:
    schedule = joining_and_leaving(new_tokens, batch_size)
    began = time.perf_counter()
    ends: list[float] = []  # of the steps
    run_candidate(
        candidate,
        prompts_RT.tolist(),
        schedule,
        use_cache=True,
        on_step=lambda tokens: ends.append(time.perf_counter() - began),
    )
    came: dict[int, list[float]] = {}
    for rows, end in zip(schedule, ends, strict=True):
        for row in rows:
            came.setdefault(row, []).append(end)
    further = [gap for times in came.values() for gap in np.diff(times).tolist()]
    return Sample(sum(new_tokens), ends[-1], tuple(times[0] for times in came.values()), tuple(further), peak_memory())


def _continuous_turn(weights: Weights, strategy: Strategy, prompts_RT: np.ndarray, new_tokens: Sequence[int]) -> Sample:
    # Without end tokens, so that every request takes as many tokens as it asks for.
    weights = replace(weights, config=replace(weights.config, eos_token_id=()))
    batching = Batching(weights, CONTINUOUS, Limits(strategy.batch_size), scheme=scheme_named(strategy.scheme))
    times: dict[int, list[float]] = {}
    for prompt, tokens in zip(prompts_RT.tolist(), new_tokens, strict=True):
        batching.add_request(prompt, tokens)

    def on_token(new: NewToken) -> None:
        times.setdefault(new.id, []).append(time.perf_counter())

    began = time.perf_counter()
    complete(batching, on_token)
    seconds = time.perf_counter() - began
    further = [gap for came in times.values() for gap in np.diff(came).tolist()]
    return Sample(
        sum(new_tokens), seconds, tuple(came[0] - began for came in times.values()), tuple(further), peak_memory()
    )
