"""The best choice under a budget, against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest

from dfq.errors import UserError
from dfq.mixed_precision.allocation import allocate, budget_of, cost, solve
from dfq.mixed_precision.sensitivity import LayerSensitivity
from dfq.quantization.bit_widths import format_widths, parse_number, parse_widths


def total(values: list[list[float]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(row[index] for row, index in zip(values, chosen, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_better_within_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    classes = draw.randint(1, 6)
    # Prices and losses without any order: more bits may be worse, or as good.
    sizes = [draw.randint(1, 4) for _ in range(classes)]
    costs = [[draw.uniform(1, 1000) for _ in range(size)] for size in sizes]
    losses = [[draw.choice([0.0, draw.random()]) for _ in range(size)] for size in sizes]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    for share in (0.0, 0.1, 0.37, 0.8, 1.0):
        budget = least + share * (most - least) + 1e-6
        chosen = solve(costs, losses, budget)
        assert total(costs, chosen) <= budget
        everything = itertools.product(*(range(size) for size in sizes))
        best = min(total(losses, one) for one in everything if total(costs, one) <= budget)
        assert total(losses, chosen) == pytest.approx(best, abs=1e-9)


def test_more_budget_is_never_worse() -> None:
    draw = random.Random(0)
    # As many layers as a large detector has, priced over four orders of magnitude.
    sizes = [10 ** draw.uniform(3, 7) for _ in range(150)]
    costs = [[size * bits for bits in (3, 4, 5, 6, 8)] for size in sizes]
    losses = [[draw.random() * 4.0**-bits for bits in (3, 4, 5, 6, 8)] for _ in sizes]
    found = []
    for share in (3, 3.5, 4, 5, 7, 8):
        budget = share * sum(sizes) * (1 + 1e-9)
        chosen = solve(costs, losses, budget)
        assert total(costs, chosen) <= budget
        found.append(total(losses, chosen))
    assert found == sorted(found, reverse=True)
    # The least leaves no choice, the most every one.
    assert found[0] == pytest.approx(sum(row[0] for row in losses), rel=1e-3)
    assert found[-1] == pytest.approx(sum(min(row) for row in losses))


LAYERS = [
    LayerSensitivity("stem", 100, 30, ((8, 8),), (0.0,)),
    LayerSensitivity("a", 1000, 400, ((3, 8), (4, 8), (8, 8)), (9.0, 1.0, 0.5)),
    LayerSensitivity("b", 1000, 40, ((3, 8), (4, 8), (8, 8)), (0.3, 0.2, 0.1)),
    LayerSensitivity("out", 10, 10, (), ()),
]


def test_costs_and_budgets_by_hand() -> None:
    assert cost(LAYERS[1], (3, 8), "bit_operations") == 24_000
    assert cost(LAYERS[1], (3, 8), "bytes") == 150
    assert cost(LAYERS[3], None, "bytes") == 40
    # The first layer keeps its eight bits, the last stays in float.
    assert budget_of("w4a8", LAYERS, "bit_operations") == 6400 + 2 * 32_000 + 10 * 32 * 32
    assert budget_of("w4a8", LAYERS, "bytes") == 30 + 200 + 20 + 40
    assert budget_of("1.5k", LAYERS, "bytes") == 1500


def test_bits_go_where_they_count() -> None:
    budget = budget_of("w4a8", LAYERS, "bit_operations")
    # As cheap as w4a8 throughout; 8 bits of one would cost 4 of the other.
    assert allocate(LAYERS, budget, "bit_operations") == {"a": (4, 8), "b": (4, 8)}
    # In bytes the small layer may have 8 bits if it is 8 bytes more.
    assert allocate(LAYERS, 290 + 20, "bytes") == {"a": (4, 8), "b": (8, 8)}
    assert allocate(LAYERS, 290 - 1, "bytes") == {"a": (4, 8), "b": (3, 8)}


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    least = 30 + 150 + 15 + 40
    assert allocate(LAYERS, least, "bytes") == {"a": (3, 8), "b": (3, 8)}
    with pytest.raises(UserError, match=r"234 bytes cannot be kept: the least is 235; allow more"):
        allocate(LAYERS, least - 1, "bytes")


def test_widths_as_they_are_written() -> None:
    assert parse_widths("w4a8") == (4, 8)
    assert parse_widths(5) == (5, 5)
    assert parse_widths("float") is None
    assert parse_widths(format_widths((3, 6))) == (3, 6)
    for wrong in ("w9a8", "4", 1, 9, True, "", "w4", "W4A8 "):
        with pytest.raises(ValueError, match="no bit width"):
            parse_widths(wrong)
    assert parse_number("12.5G") == 12.5e9
    assert parse_number("12") == 12
    assert parse_number("w4a8") is None
