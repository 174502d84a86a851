"""Where bits are best spent: the least sum of divergences under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from ..quantization.bit_widths import Widths, parse_number, parse_widths
from .sensitivity import LayerSensitivity

COSTS = ("bit_operations", "bytes")
"""What a budget can be in."""

BUCKETS = 50_000
"""So finely is a budget divided: costs are rounded up to it, and what is left is spent after."""


def cost(row: LayerSensitivity, widths: Widths | None, kind: str) -> float:
    """What a layer costs at given widths; None: in float, 32 bits.

    Args:
        kind: "bit_operations": weight bits * activation bits * MACs of an image; "bytes": of the
            weights.
    """
    weight_bits, activation_bits = widths or (32, 32)
    if kind == "bytes":
        return row.weights * weight_bits / 8
    return float(row.macs) * weight_bits * activation_bits


def budget_of(text: str, rows: Sequence[LayerSensitivity], kind: str) -> float:
    """What a budget allows all layers together.

    Args:
        text: `w4a8`, for what the network costs with every free layer at these widths; or a number
            with k, M, G or T behind it.
        rows: the layers, those that are not free included.
        kind: one of `COSTS`.
    """
    number = parse_number(text)
    if number is not None:
        return number
    widths = parse_widths(text)
    return sum(cost(row, widths if row.free else _only(row), kind) for row in rows)


def _only(row: LayerSensitivity) -> Widths | None:
    return row.widths[0] if row.widths else None


def require_affordable(rows: Sequence[LayerSensitivity], budget: float, kind: str) -> float:
    """What the layers may cost beyond those that are not free.

    Args:
        rows: the layers; what they were measured at does not matter.
        budget, kind: as for `allocate`.

    Raises:
        UserError: where even the cheapest widths cost more.
    """
    fixed = sum(cost(row, _only(row), kind) for row in rows if not row.free)
    cheapest = sum(
        min(cost(row, widths, kind) for widths in row.widths) for row in rows if row.free
    )
    if fixed + cheapest > budget * (1 + 1e-9):
        raise UserError(
            f"quantization.mixed.budget: {budget:.4g} {_words(kind)} cannot be kept: the least is "
            f"{fixed + cheapest:.4g}; allow more, or give quantization.mixed.candidates fewer bits"
        )
    return budget - fixed


def allocate(rows: Sequence[LayerSensitivity], budget: float, kind: str) -> dict[str, Widths]:
    """Widths of every free layer, with the least sum of divergences that the budget allows.

    The divergences of single layers are taken to add up, as in HAWQ-V2 (Dong et al., 2020): then it
    is a knapsack problem with one item of each class, solved by dynamic programming.

    Args:
        rows: the layers.
        budget: for all of them together, see `budget_of`.
        kind: one of `COSTS`.

    Returns:
        Layer name -> (weight bits, activation bits).

    Raises:
        UserError: where even the cheapest widths cost more.
    """
    free_budget = require_affordable(rows, budget, kind)
    free = [row for row in rows if row.free]
    costs = [[cost(row, widths, kind) for widths in row.widths] for row in free]
    picks = solve(costs, [list(row.divergence) for row in free], free_budget)
    return {row.name: row.widths[index] for row, index in zip(free, picks, strict=True)}


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def solve(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """One choice of each class, with the least sum of losses at a sum of costs within the budget.

    Exact but for the rounding of costs to `BUCKETS` parts of what the classes may spend beyond
    their cheapest choices; no budget is ever exceeded.

    Args:
        costs, losses: of each choice of each class.
        budget: at least the sum of the cheapest choices.

    Returns:
        The index of the choice, for each class.
    """
    if not costs:
        return []
    least = [min(class_costs) for class_costs in costs]
    spare = max(0.0, budget - sum(least))
    most = sum(max(class_costs) - low for class_costs, low in zip(costs, least, strict=True))
    if most <= spare:
        return [int(np.argmin(class_losses)) for class_losses in losses]

    def units(row: int, index: int) -> int:
        extra = costs[row][index] - least[row]
        if extra <= 0:
            return 0
        # Nothing to spend: whatever costs more is out of reach.
        return BUCKETS + 1 if extra > spare else math.ceil(extra / spare * BUCKETS - 1e-6)

    # best[b]: the least loss of the classes so far for at most b units.
    best = np.zeros(BUCKETS + 1)
    picks = np.zeros((len(costs), BUCKETS + 1), np.int16)
    for row, class_losses in enumerate(losses):
        after = np.full(BUCKETS + 1, math.inf)
        for index, loss in enumerate(class_losses):
            price = units(row, index)
            if price > BUCKETS:
                continue
            reached = np.full(BUCKETS + 1, math.inf)
            reached[price:] = best[: BUCKETS + 1 - price] + loss
            better = reached < after
            after[better] = reached[better]
            picks[row, better] = index
        best = after
    choices = []
    units_left = BUCKETS
    for row in reversed(range(len(costs))):
        index = int(picks[row, units_left])
        units_left -= units(row, index)
        choices.append(index)
    choices.reverse()
    return _spend_rest(choices, costs, losses, budget)


def _spend_rest(
    choices: list[int],
    costs: Sequence[Sequence[float]],
    losses: Sequence[Sequence[float]],
    budget: float,
) -> list[int]:
    """Take single better choices while the budget allows: what rounding left over."""
    spent = sum(class_costs[index] for class_costs, index in zip(costs, choices, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for row, now in enumerate(choices):
            for index, loss in enumerate(losses[row]):
                gain = losses[row][now] - loss
                fits = spent + costs[row][index] - costs[row][now] <= budget
                if gain > 0 and fits and (best is None or gain > best[0]):
                    best = gain, row, index
        if best is None:
            return choices
        _, row, index = best
        spent += costs[row][index] - costs[row][choices[row]]
        choices[row] = index
