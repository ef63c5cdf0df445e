"""Each layer that is wrong by itself explained by itself: what a run of the whole model then only has to confirm."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from refengine.config import Config
from verify.causes import Cause, Evidence
from verify.causes.footprint import likely_at
from verify.naming.counterfactual import Counterfactual, unchanged
from verify.naming.layer_screen import LayerScreen, is_of_layers
from verify.naming.screen import Tried
from verify.naming.search import Mistakes, Search

SHOW_IN: Mapping[str, tuple[str, ...]] = {  # where what is wrong in a half of a layer can show first
    "self_attn.residual": ("input_layernorm", "self_attn.q_rope", "self_attn.attend"),
    "mlp.residual": ("post_attention_layernorm", "mlp."),
}
PARTIAL = 2  # mistakes that explain a part of a layer
MOST = 6  # explanations of a layer that are followed up
COMBINED = 12  # of several layers that are explained in different ways


@dataclass(frozen=True)
class Layerwise:
    """What the layers tell.

    Attributes:
        proposed: mistakes that explain every layer that is wrong, those that fit best first.
        partial: mistakes that explain a part of the first layer that nothing explains, in the layers where they do.
    """

    proposed: tuple[Mistakes, ...] = ()
    partial: tuple[Mistakes, ...] = ()


def explain_layers(
    screens: Iterable[LayerScreen],
    causes: Mapping[str, Cause],
    evidence: Evidence,
    ends: float,
    on_step: Callable[[], None] = lambda: None,
    is_noise: Callable[[], bool] = lambda: False,
) -> Layerwise:
    """Counterfactuals tried on single layers, which takes as many times less as there are layers.

    Args:
        screens: of the layers that are wrong by themselves.
        causes: that may explain them, by name.
        evidence: of the whole run.
        ends: by the monotonic clock; from then on nothing is begun.
        on_step: told of every counterfactual.
        is_noise: whether all that is wrong may be coarser arithmetic; asked before pairs of mistakes are tried.
    """
    found: list[Mistakes] = []
    ways: dict[tuple[int, ...], list[int]] = {}  # numbers of what explains layers, and the layers
    waiting = iter(screens)
    for screen in waiting:
        if time.monotonic() > ends:
            return Layerwise()
        explaining = [number for number, each in enumerate(found) if screen.tried(*each).is_promising]
        if not explaining:
            search = _searched(screen, causes, evidence, ends, on_step, is_noise)
            if not search.promising and search.is_over:
                return Layerwise()
            if not search.promising:
                rest = _helping(search, [screen, *waiting], evidence.config)
                return Layerwise(
                    partial=tuple(
                        (*some, *more) for some in _combined(found, ways, evidence.config)[:1] or [()] for more in rest
                    )
                )
            best = map(search.necessary, _best_of_causes(search.promising))
            new = [tuple(map(_everywhere, each.mistakes)) for each in best]
            explaining = list(range(len(found), len(found) + len(new)))
            found += new
        ways.setdefault(tuple(explaining), []).append(screen.given.layer)
    return Layerwise(_combined(found, ways, evidence.config))


def _searched(
    screen: LayerScreen,
    causes: Mapping[str, Cause],
    evidence: Evidence,
    ends: float,
    on_step: Callable[[], None],
    is_noise: Callable[[], bool],
) -> Search:
    """Causes that can show in the halves that are wrong: alone, and where none is enough in pairs."""
    here = replace(evidence, suspects=(frozenset({screen.given.layer}),))
    points = itertools.chain.from_iterable(SHOW_IN[part.point] for part in screen.given.wrong)
    likely = set(itertools.chain.from_iterable(map(likely_at, points)))
    of_caches = {name: causes[name] for name in causes if name in likely and name.startswith("cache-")}
    others = {name: causes[name] for name in causes if name in likely and name not in of_caches}
    search = Search(_only_of_layers(screen), screen.nothing, ends, on_step)
    begins_later = screen.is_right_in_prompts(())
    search.go((of_caches if begins_later else others).values(), here, searching=False)
    if search.promising or (not begins_later and _is_right_in_prompts(screen, search)):
        return search
    search.beside_best(others, here)
    for able in (others, of_caches):  # zeros of a large buffer take time
        if search.promising:
            return search
        search.go(able.values(), here, searching=not begins_later)
    if search.promising or _is_right_in_prompts(screen, search) or is_noise():
        return search
    known = search.known(others.values(), here)
    search.pairs(others, here, [known] if known.mistakes else [])
    return search


def _is_right_in_prompts(screen: LayerScreen, search: Search) -> bool:
    """Whether one mistake leaves what later passes bring: what acts there alone is tried on whole runs beside it."""
    best = min(search.best_of_each(), key=_most_at_rest, default=search.nothing)
    return screen.is_right_in_prompts(best.mistakes)


def _most_at_rest(tried: Tried) -> tuple[float, float]:
    return -tried.rest, tried.ratio


def _only_of_layers(screen: LayerScreen) -> Callable[..., Tried]:
    """What mistakes leave of a layer; all of it where they are none of a layer's."""

    def run(*mistakes: Counterfactual) -> Tried:
        is_shown = all(is_of_layers(each) and each.is_in(screen.given.layer) for each in mistakes)
        return screen.tried(*mistakes) if is_shown else replace(screen.nothing, mistakes=mistakes)

    return run


def _best_of_causes(promising: Sequence[Tried]) -> list[Tried]:
    """Of the same causes what fits best."""
    best: dict[frozenset[str], Tried] = {}
    for each in promising:
        best.setdefault(frozenset(mistake.cause for mistake in each.mistakes), each)
    return list(best.values())[:MOST]


def _helping(search: Search, screens: Sequence[LayerScreen], config: Config) -> list[Mistakes]:
    """What explains a part of the first of these layers, in all of them where it does."""
    bases = sorted((each for each in search.best_of_each() if each.helps(search.nothing)), key=_most_at_rest)
    made = []
    for base in bases[:PARTIAL]:
        mistakes = tuple(map(_everywhere, base.mistakes))
        layers = [each.given.layer for each in screens if each.tried(*mistakes).helps(each.nothing)]
        made.append(_in_layers(mistakes, layers, config))
    return made


def _combined(
    found: Sequence[Mistakes], ways: Mapping[tuple[int, ...], Sequence[int]], config: Config
) -> tuple[Mistakes, ...]:
    """What explains all layers together: of each group of layers one of the ways that explain it."""
    made = []
    choices = [[(found[number], layers) for number in numbers] for numbers, layers in ways.items()]
    for chosen in itertools.islice(itertools.product(*choices), COMBINED if ways else 0):
        layers_of: dict[tuple[str, str], list[int]] = {}
        mistakes = {each.said: each for some, _ in chosen for each in some}
        for some, layers in chosen:
            for each in some:
                layers_of.setdefault(each.said, []).extend(layers)
        made.append(tuple(_in_layers((mistakes[key],), layers, config)[0] for key, layers in layers_of.items()))
    return tuple(made)


def _everywhere(mistake: Counterfactual) -> Counterfactual:
    """The same in all layers, unless it is in weights, which say themselves where they are."""
    return mistake if mistake.weights is not unchanged else replace(mistake, layers=None)


def _in_layers(mistakes: Mistakes, layers: Sequence[int], config: Config) -> Mistakes:
    where = None if len(layers) == config.num_hidden_layers else frozenset(layers)
    return tuple(each if each.weights is not unchanged else replace(each, layers=where) for each in mistakes)


def without_last_norm(mistakes: Mistakes, config: Config) -> Mistakes:
    """What is in all layers, and not in what is behind them."""
    layers = frozenset(range(config.num_hidden_layers))
    return tuple(each if each.layers is not None else replace(each, layers=layers) for each in mistakes)
