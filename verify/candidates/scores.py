"""What an export does to the scores of its attention, between their product and their softmax."""

import math

from verify.candidates.operators import Operator, Operators

PASSED = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Expand", "Slice", "Max")
FURTHEST = 12  # operators between a number and what it belongs to: a damaged graph may go round in circles


def scores_into(operators: Operators, softmax: Operator) -> tuple[float, float] | None:
    """What products of queries and keys are multiplied by, before or after, and the cap on them or 0.

    None where that is not known: there is no product, or a factor follows from the run.
    """
    found = _to_product(operators, softmax.inputs[0], FURTHEST)
    sides = [_factor(operators, name) for name in found[0].inputs] if found else []
    if not found or None in sides:
        return None
    return found[1] * math.prod(side for side in sides if side is not None), found[2]


def _to_product(operators: Operators, name: str, deepest: int) -> tuple[Operator, float, float] | None:
    """The product that scores come from, what it is multiplied by on the way, and the cap or 0."""
    maker = operators.maker(name)
    if maker is None or not deepest:
        return None
    if maker.kind == "MatMul":
        return maker, 1.0, 0.0
    pair = operators.operand(maker) if maker.kind in ("Mul", "Div", "Add", "Sub") else None
    if pair:
        found = _to_product(operators, pair[1], deepest - 1)
        if not found or maker.kind in ("Add", "Sub"):
            return found
        product, factor, cap = found
        by = _by(maker, pair[0])
        # Behind a tanh, a factor is the cap; before it, the factor was divided by that.
        return product, factor * by, by if cap else 0.0
    if maker.kind == "Tanh":
        found = _to_product(operators, maker.inputs[0], deepest - 1)
        return found and (found[0], found[1], 1.0)
    within = maker.inputs if maker.kind in (*PASSED, "Add", "Where") else ()
    ways = (_to_product(operators, each, deepest - 1) for each in within)
    return next((way for way in ways if way), None)


def _factor(operators: Operators, name: str) -> float | None:
    """What queries or keys are multiplied by on their last way to their product; None where that is not known."""
    factor, maker = 1.0, operators.maker(name)
    for _ in range(FURTHEST):
        if maker is None or maker.kind not in (*PASSED, "Mul", "Div"):
            break
        if maker.kind in PASSED:
            maker = operators.maker(maker.inputs[0])
        elif pair := operators.operand(maker):
            factor *= _by(maker, pair[0])
            maker = operators.maker(pair[1])
        else:
            return None
    return factor


def _by(operator: Operator, number: float) -> float:
    """What a product or quotient with a number multiplies by."""
    return number if operator.kind == "Mul" else 1 / number if number else math.inf
