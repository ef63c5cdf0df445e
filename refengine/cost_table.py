"""`python -m refengine cost MODEL`: what generation costs on paper, with a cache and without, and for how long."""

import argparse
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refengine.checkpoint import open_checkpoint, read_json
from refengine.config import Config
from refengine.cost import Flops, GenerationCost, PassCost, generation_cost, kept_slots
from refengine.errors import ConfigError, InputError
from refengine.machine import Machine, measure_bandwidth, measure_flops
from refengine.quant import SCHEMES, UNMEASURED
from refengine.scheme import Scheme, check_scheme

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GIGA = 1e9
MOST = 10**9  # of what options give: beyond it a figure is a slip of the finger
SEQUENCE_LENGTH = 512  # unless the model has fewer positions
UNITS = "kMGTPE"  # of 1000, 1000**2, ...
BYTES: Mapping[str, str] = {
    "weights": "weights, B",
    "cache_read": "cache read, B",
    "cache_written": "cache written, B",
    "activations": "between blocks, B",
}


def add_cost(verbs: Any) -> None:
    """Adds the verb to a parser's verbs. Its numbers stay text here, so that a wrong one is one line, as all errors."""
    verb = verbs.add_parser("cost", help="FLOPs, bytes and least time of generation, on paper")
    verb.set_defaults(run=_cost)
    verb.add_argument(
        "model",
        metavar="MODEL",
        help="checkpoint directory (its config.json is enough), hub name or .gguf file",
    )
    verb.add_argument("--batch-size", default="1", metavar="B", help="rows; default 1")
    verb.add_argument(
        "--sequence-length",
        metavar="S",
        help=f"tokens of each row; default {SEQUENCE_LENGTH}, or all positions of a shorter model",
    )
    verb.add_argument(
        "--kv-cache", default="float32", metavar="SCHEME", help=f"{', '.join([*SCHEMES, *UNMEASURED])}; default float32"
    )
    verb.add_argument("--bandwidth", metavar="GB/s", help="memory bandwidth; measured when not given")
    verb.add_argument("--flops", metavar="GFLOP/s", help="float32 FLOPs a second; measured when not given")


def _cost(options: argparse.Namespace) -> int:
    from rich.console import Console

    config = _config_of(options.model)
    batch_size = _whole("--batch-size", options.batch_size)
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    if options.sequence_length is not None:
        length = _whole("--sequence-length", options.sequence_length)
    bandwidth, flops = _rate("--bandwidth", options.bandwidth), _rate("--flops", options.flops)
    every = {**SCHEMES, **UNMEASURED}
    if options.kv_cache not in every:
        raise InputError(f"KV cache: expected one of {', '.join(every)}, found {options.kv_cache!r}")
    check_scheme(config, every[options.kv_cache])
    costs = {name: generation_cost(config, batch_size, length, scheme) for name, scheme in _storable(config).items()}
    machine = Machine(bandwidth or measure_bandwidth(), flops or measure_flops())
    measured = [name for name, given in (("bandwidth", bandwidth), ("FLOP rate", flops)) if given is None]
    console = Console(highlight=False)
    with console.capture() as captured:
        _print_subject(console, options, config, costs[options.kv_cache], length)
        how = f" ({' and '.join(measured)} measured just now, with NumPy)" if measured else ""
        rates = f"{machine.bandwidth / GIGA:.3g} GB/s, {machine.flops / GIGA:.4g} GFLOP/s"
        console.print(f"[bold]machine[/]  {rates}{how}\n")
        console.print(_passes(costs[options.kv_cache], machine, batch_size))
        console.print()
        console.print(_schemes(costs, options.kv_cache, machine, batch_size))
        console.print()
        for line in _words(costs[options.kv_cache], length, batch_size):
            console.print(line)
    # Written here and not by the console, which would end the process with 1 when the reader of a pipe has gone.
    print(captured.get(), end="", flush=True)
    return 0


def _storable(config: Config) -> dict[str, Scheme]:
    """The schemes that can store this model's heads; bytes do not depend on scales that are still to be measured."""
    schemes = {}
    for name, scheme in {**SCHEMES, **UNMEASURED}.items():
        with suppress(InputError):
            check_scheme(config, scheme)
            schemes[name] = scheme
    return schemes


def _config_of(model: str) -> Config:
    """Of a directory, `config.json` is enough: the cost of a model can be known before its weights are here."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return open_checkpoint(model).config
    try:
        return Config.from_dict(read_json(file))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _whole(option: str, text: str) -> int:
    if not (text.isdecimal() and len(text) <= len(str(MOST)) and 1 <= int(text) <= MOST):
        raise InputError(f"{option}: expected a whole number from 1 to {MOST}, found {text[:40]!r}")
    return int(text)


def _rate(option: str, text: str | None) -> float | None:
    """A rate in units a second, from a text that gives it in thousand millions of them."""
    if text is None:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 1 / MOST <= rate <= MOST:
        raise InputError(f"{option}: expected a number above 0 (1e-9 to 1e9), found {text[:40]!r}")
    return rate * GIGA


def _print_subject(
    console: "Console", options: argparse.Namespace, config: Config, cost: GenerationCost, length: int
) -> None:
    from rich.markup import escape

    window = "" if config.sliding_window is None else f", window of {config.sliding_window}"
    rows, slots = int(options.batch_size), kept_slots(config, length)
    values = 2 * config.num_hidden_layers * rows * config.num_key_value_heads * slots * config.head_dim
    product = (
        f"2 x layers {config.num_hidden_layers} x rows {rows} x KV heads {config.num_key_value_heads} x tokens {slots} "
        f"x head_dim {config.head_dim} x {cost.cache_nbytes / values:.4g} bytes, scales included"
    )
    facts = {
        "model": f"{options.model} ({config.model_type}, {config.num_hidden_layers} layers{window})",
        "weights": f"{in_units(cost.weights_nbytes)}B as float32, the engine's own (the model says {config.dtype})",
        "batch": f"{int(options.batch_size)} x {length} tokens",
        "cache": f"{in_units(cost.cache_nbytes)}B as {options.kv_cache}: {product}",
    }
    for heading, text in facts.items():
        console.print(f"[bold]{heading:7}[/]  {escape(text)}", soft_wrap=heading == "model")


def _passes(cost: GenerationCost, machine: Machine, batch_size: int) -> "Table":
    passes = (cost.prefill_cached, cost.prefill_uncached, cost.decode_cached, cost.decode_uncached)
    table = _table("", "prefill,\ncache", "prefill,\nno cache", "decode step,\ncache", "decode step,\nno cache")

    for part in (field.name for field in fields(Flops)):
        table.add_row(part, *(in_units(getattr(each.flops, part)) for each in passes))
    table.add_row("all FLOPs", *(in_units(each.flops.total) for each in passes), style="bold")
    for kind, heading in BYTES.items():
        table.add_row(heading, *(in_units(getattr(each.nbytes, kind)) for each in passes))
    table.add_row("all bytes moved", *(in_units(each.nbytes.total) for each in passes), style="bold")
    table.add_row("least time", *(_time(each, machine) for each in passes), style="bold")
    table.add_row("bound by", *("memory" if each.is_memory_bound(machine) else "FLOPs" for each in passes))
    decoded = (in_units(batch_size / each.seconds(machine)) for each in passes[2:])
    table.add_row("tokens a second", "", "", *decoded)
    return table


def _schemes(costs: Mapping[str, GenerationCost], chosen: str, machine: Machine, batch_size: int) -> "Table":
    table = _table("cache as", "held, B", "times float32", "decode reads, B", "least time", "tokens/s")
    for name, cost in costs.items():
        step = cost.decode_cached
        ratio = cost.decode_cached.nbytes.cache_read / costs["float32"].decode_cached.nbytes.cache_read
        table.add_row(
            name,
            in_units(cost.cache_nbytes),
            f"{ratio:.3g}",
            in_units(step.nbytes.cache_read),
            _time(step, machine),
            in_units(batch_size / step.seconds(machine)),
            style="bold" if name == chosen else "",
        )
    return table


def _words(cost: GenerationCost, length: int, batch_size: int) -> list[str]:
    cached, uncached = cost.decode_cached, cost.decode_uncached
    times = in_units(uncached.flops.total / cached.flops.total).strip()
    shrunk = f"{in_units(uncached.nbytes.activations)}B to {in_units(cached.nbytes.activations)}B"
    masked = 1 - cost.prefill_cached.visible / cost.prefill_cached.scored
    return [
        f"[bold]What the cache saves[/] at token {length}: {times} times the FLOPs. The projections, the rotation and "
        "the scores of past tokens are not computed again; nor is their MLP, since past tokens are not fed again. "
        f"What passes between blocks shrinks from the sequence to one token a row: {shrunk}.",
        f"[bold]What it does not save[/]: all weights are read at each step ({in_units(cached.nbytes.weights)}B, for "
        f"{batch_size} {'rows' if batch_size > 1 else 'row'} together), and the whole cache too "
        f"({in_units(cached.nbytes.cache_read)}B); the new token's scores with every token held are computed.",
        f"[bold]How it is counted[/]: a multiply-add is two FLOPs; lm_head on the last token alone; of the prefill's "
        f"scores, {masked:.0%} are computed and then masked. Each array moves once, so times are the least possible.",
    ]


def _table(first: str, *others: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _time(cost: PassCost, machine: Machine) -> str:
    seconds = cost.seconds(machine)
    scale, unit = next(
        (pair for pair in ((1.0, "s"), (1e3, "ms"), (1e6, "us")) if seconds * pair[0] >= 0.9995), (1e9, "ns")
    )
    return f"{in_units(float(f'{seconds * scale:.3g}')).strip()} {unit}"


def in_units(amount: float) -> str:
    """Four significant digits and a power of 1000: 999, 1.234 k, 56.70 G."""
    if amount < 1000:
        return f"{amount:.4g} "
    power = min(int(math.log10(amount) // 3), len(UNITS))
    if amount / 1000**power >= 999.95 and power < len(UNITS):
        power += 1  # it would be rounded to 1000
    return f"{amount / 1000**power:#.4g}".rstrip(".") + f" {UNITS[power - 1]}"
