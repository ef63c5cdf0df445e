"""What a diagnosis says to a reader: the cause, what to do, where, and what else was tried."""

from collections.abc import Iterator

from verify.report.figures import figure
from verify.report.result import CauseFound, Diagnosis, Location

ANYTHING = 0.9  # of what is wrong: what leaves more of it is no hint, but chance
OF_RUNTIMES = ("graph-optimizer", "runtime-kernel")  # shown by running an export without them


def cause_in_words(diagnosed: Diagnosis) -> str:
    """One line: the cause, or the causes that cannot be told apart, or that none is known."""
    explaining = [cause for cause in diagnosed.causes if cause.status != "ruled-out"]
    if diagnosed.status == "unexplained" and diagnosed.untried:
        return f"not known: {diagnosed.untried}"
    if not explaining or diagnosed.status == "unexplained":
        measured = [(cause.noise_ratio, cause) for cause in diagnosed.causes if cause.noise_ratio is not None]
        ratio, best = min(measured, key=lambda each: each[0].after, default=(None, None))
        # Written so that NaN, which compares false with everything, is no hint either.
        if ratio is None or best is None or not ratio.after < ANYTHING * ratio.before:
            return "not known: no cause of the catalogue explains a tenth of it"
        return f"not known: what comes nearest is {cause_in_a_phrase(best)}, which leaves {_left(best)}"
    first = explaining[0]
    if diagnosed.status == "ambiguous":
        return f"one of {'; '.join(map(cause_in_a_phrase, explaining))}: each leaves the noise alone, as {_left(first)}"
    found = " and ".join(cause_in_a_phrase(cause) for cause in explaining if cause.status == "confirmed")
    how = "run without it" if first.name in OF_RUNTIMES else "with it in the reference"
    return f"{found}: {how}, what is left is {_left(first)}"


def cause_in_a_phrase(cause: CauseFound) -> str:
    """Its name, its parameters in brackets, and its layers."""
    parameters = ", ".join(f"{name} {_value(value)}" for name, value in cause.parameters.items())
    layers = f" in layer{'s' * (len(cause.layers) > 1)} {_numbers(cause.layers)}" if cause.layers else ""
    return f"{cause.name}{f' ({parameters})' if parameters else ''}{layers}"


def to_do_in_words(diagnosed: Diagnosis) -> str | None:
    """What puts a named cause right; None where none is named."""
    fixes = [cause.fix for cause in diagnosed.causes if cause.status == "confirmed" and cause.fix]
    return "; ".join(fixes) if diagnosed.status == "named" and fixes else None


def details(diagnosed: Diagnosis) -> Iterator[str]:
    """Lines for below the figures."""
    if diagnosed.location is not None:
        yield f"location: {_where(diagnosed.location)}"
    if diagnosed.status == "named":
        for cause in (each for each in diagnosed.causes if each.status == "equivalent"):
            yield f"the same, as {cause_in_a_phrase(cause)}: with it in the reference, what is left is {_left(cause)}"
    ruled_out = [cause for cause in diagnosed.causes if cause.status == "ruled-out"]
    ratios = [cause.noise_ratio for cause in ruled_out if cause.noise_ratio is not None]
    if ruled_out and diagnosed.status != "named":
        tried = ", ".join(
            f"{cause.name} ({figure(cause.noise_ratio.after)})" if cause.noise_ratio else cause.name
            for cause in ruled_out
        )
        yield f"ruled out{f', with what each leaves of {figure(ratios[0].before)}' if ratios else ''}: {tried}"
    yield from (note for note in diagnosed.notes if note != diagnosed.untried or diagnosed.status != "unexplained")


def _value(value: object) -> str:
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _numbers(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _left(cause: CauseFound) -> str:
    if cause.noise_ratio is None:
        return "no token that differs"
    return f"{figure(cause.noise_ratio.after)} of a noise ratio of {figure(cause.noise_ratio.before)}"


def _where(location: Location) -> str:
    place = [
        f"layer {location.layer}" if location.layer is not None else "",
        location.point or "",
        f"node {location.node}" if location.node else "",
        f"on the rung of the {location.rung}" if location.rung else "",
        location.detail or "",
    ]
    return ", ".join(part for part in place if part)
