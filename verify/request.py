"""What is to be compared: prompts and batches, as they were asked for and as a candidate can meet them."""

from dataclasses import dataclass, replace
from typing import Literal

from refengine.config import Config
from refengine.requests import Limits
from refengine.tokens import Rows
from verify.candidates import Opened
from verify.expect import EXACT, Expectation
from verify.own_weights import notes_on_int8
from verify.schedule import SCHEDULES, Batching, Schedule, is_padded

CacheMode = Literal["on", "off"]


@dataclass(frozen=True)
class Request:
    """What to compare: prompts, how far to decode, in which cache modes, and who is decoded together.

    Attributes:
        batch_size: most rows at once; None: all of them.
        batching: when rows join and leave a batch.
        max_tokens: of dynamic batches, most slots of the cache (rows times the longest of them, new tokens included).
        expectation: what it is held against, without its cache where there is none; None: what its settings say.
    """

    prompts: Rows
    max_new_tokens: int
    modes: tuple[CacheMode, ...] = ("off", "on")
    batch_size: int | None = None
    batching: Batching = "static"
    max_tokens: int | None = None
    expectation: Expectation | None = EXACT

    @property
    def lengths(self) -> list[int]:
        """Of the prompts."""
        return [len(prompt) for prompt in self.prompts]

    @property
    def most_rows(self) -> int:
        """That are ever decoded together."""
        return self.batch_size or len(self.prompts)

    @property
    def schedule(self) -> Schedule:
        """Who is decoded together, step by step."""
        limits = Limits(self.most_rows, self.max_tokens)
        return SCHEDULES[self.batching](self.lengths, self.max_new_tokens, limits)

    @property
    def is_padded(self) -> bool:
        """Whether any batch has rows of different lengths."""
        return is_padded(self.schedule, self.lengths)


def request_for(candidate: Opened, request: Request) -> Request:
    """The request as this candidate can meet it: static batches of the number of rows that it takes, or of one.

    Rows whose inputs share a scale are not decoded together: none of them would give what it gives alone.
    Rows of different lengths need padding in front, in the past too where they join a running batch. A cache that codes
    neighbours in time together codes padding with them, and what that holds is nobody's business but the runtime's. One
    whose first pass reads what came, unless it is of fewer tokens than so many, counts padding among them.
    """
    if candidate.interface.batch_size is not None:
        return replace(request, batching="static", batch_size=candidate.interface.batch_size)
    if request.most_rows > 1 and _shares_a_scale(candidate, request):
        return replace(request, batching="static", batch_size=1)
    ragged = request.batching == "continuous" or len(set(request.lengths)) > 1
    scheme = (request.expectation or candidate.expectation).scheme
    padding_matters = scheme is not None and (scheme.groups_tokens or min(request.lengths) < scheme.first_pass_raw)
    if ragged and request.most_rows > 1 and (padding_matters or not candidate.can_pad_left):
        return replace(request, batching="static", batch_size=1)
    if request.batching == "continuous" and not candidate.can_merge:
        return replace(request, batching="static")
    return request


def notes_on(candidate: Opened, request: Request) -> list[str]:
    """What a reader has to know of how this candidate was compared."""
    notes = []
    if not candidate.interface.has_cache and "on" in request.modes:
        notes.append(
            f"{candidate.runtime}: the export has no past_key_values input, so it was compared without a cache only"
        )
    if request.expectation is None:
        notes.append(f"{candidate.runtime}: its settings say that it computes as {candidate.expectation.name}")
    notes += notes_on_int8(candidate, request.expectation)
    met = request_for(candidate, request)
    if (met.batching, met.most_rows) == (request.batching, request.most_rows):
        return notes
    why = "the export cannot be told of left padding, so its prompts were run one by one"
    if candidate.can_pad_left:
        why = "its cache would take padding for tokens, so its prompts were run one by one"
    if _shares_a_scale(candidate, request):
        why = "all that it is fed together shares a scale, so its prompts were run one by one"
    if met.most_rows == request.most_rows:
        why = "the export keeps its past to itself, so that no row can join or leave: it was run in static batches"
    if candidate.interface.batch_size is not None:
        instead = "" if request.batching == "static" else ", so it was run in static batches of as many"
        rows = "one row" if met.most_rows == 1 else f"{met.most_rows} rows"
        why = f"it takes {rows} at a time and no other number{instead}"
    return [*notes, f"{candidate.runtime}: {why}"]


def _shares_a_scale(candidate: Opened, request: Request) -> bool:
    """Whether what is fed together is rounded together, by the candidate or in what it is held against."""
    asked = request.expectation
    return candidate.expectation.arithmetic.together or (asked is not None and asked.arithmetic.together)


def not_revealed(config: Config, request: Request, padded: bool) -> list[str]:
    """Mistakes that these prompts could not have shown, and why; `padded` says whether any batch was left-padded."""
    longest = max(map(len, request.prompts)) + request.max_new_tokens - 1
    hidden = []
    if longest < 2:
        hidden.append("rope: no sequence is longer than one token")
    if config.sliding_window is not None and longest <= config.sliding_window:
        hidden.append(f"sliding-window: no sequence is longer than the window of {config.sliding_window}")
    rope = config.rope_parameters
    if rope.rope_type == "dynamic" and longest <= config.max_position_embeddings:
        hidden.append(f"rope-scaling: no sequence is longer than {config.max_position_embeddings} tokens")
    if not padded:
        hidden.append("padding-unmasked, positions-ignore-padding: no batch was left-padded")
    if config.num_hidden_layers <= 10:
        hidden.append("cache-layer-order: sorting as text goes wrong only with more than 10 layers")
    if "on" in request.modes and request.max_new_tokens < 2:
        hidden.append("cache: nothing was decoded after the first token, so no cache was read")
    if len(request.prompts) < 2:
        hidden.append("cache-not-reset: there was one prompt only")
    return hidden
