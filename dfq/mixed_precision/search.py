"""From a recipe and images to a mixed-precision policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.pixels import LabelledImages
from ..errors import UserError
from ..models.base import Model
from ..quantization.bit_widths import Widths, format_widths
from ..quantization.policy import Policy
from ..quantization.settings import Quantization
from ..runtime.progress import Progress
from .allocation import allocate, budget_of, cost, require_affordable
from .sensitivity import LayerSensitivity, measure, unmeasured

_BATCH = 8


@dataclass(frozen=True)
class Sensitivity:
    """What each layer's bits do, and which they are given.

    Attributes:
        layers: in execution order.
        kind: what costs are in: "bit_operations" of an image, or "bytes" of the weights.
        images: on how many it was measured.
        budget: for all layers together; None where none was asked for.
        allocated: layer name -> (weight bits, activation bits) of the free layers; None without a
            budget.
    """

    layers: tuple[LayerSensitivity, ...]
    kind: str
    images: int
    budget: float | None = None
    allocated: dict[str, Widths] | None = None

    def widths(self, row: LayerSensitivity) -> Widths | None:
        """The bits a layer is given; None: float, or there was no budget to choose under."""
        if row.free:
            return (self.allocated or {}).get(row.name)
        return row.widths[0] if row.widths else None

    @property
    def overrides(self) -> dict[str, str]:
        """What to write into a recipe's `quantization.overrides`."""
        return {name: format_widths(widths) for name, widths in (self.allocated or {}).items()}

    @property
    def spent(self) -> float | None:
        """What all layers together cost as they were chosen; None without a budget."""
        if self.allocated is None:
            return None
        return sum(cost(row, self.widths(row), self.kind) for row in self.layers)

    @property
    def divergence(self) -> float | None:
        """Sum of the chosen layers' divergences: what the choice made least."""
        if self.allocated is None:
            return None
        return sum(
            row.divergence[row.widths.index(self.allocated[row.name])]
            for row in self.layers
            if row.free
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "cost": self.kind,
            "images": self.images,
            "budget": self.budget,
            "spent": self.spent,
            "divergence": self.divergence,
            "overrides": self.overrides,
            "layers": [row.to_dict() for row in self.layers],
        }


def check_budget_can_be_kept(teacher: Model, policy: Policy, settings: Quantization) -> None:
    """Refuse a budget before anything is measured.

    Args:
        teacher, policy, settings: as for `find_bits`.

    Raises:
        UserError: where no layer is free, or the budget cannot be kept.
    """
    mixed = settings.mixed
    rows = unmeasured(teacher, policy, settings.candidates())
    if not any(row.free for row in rows):
        raise UserError("quantization.overrides: they fix the bits of every layer; none is free")
    if mixed.budget is not None:
        require_affordable(rows, budget_of(mixed.budget, rows, mixed.cost), mixed.cost)


def find_bits(
    teacher: Model,
    policy: Policy,
    settings: Quantization,
    data: LabelledImages,
    progress: Progress,
) -> Sensitivity:
    """Measure every free layer, and with a budget spread it over them.

    Args:
        teacher: the float detector, BatchNorm folded.
        policy: what `settings` says but for mixed precision.
        settings: the `quantization` section of a recipe.
        data: its first images are measured on, and calibrated with.
        progress: told how far it is.

    Raises:
        UserError: where no layer is free, or the budget cannot be kept.
    """
    mixed = settings.mixed
    check_budget_can_be_kept(teacher, policy, settings)
    count = min(mixed.images, len(data))
    calibration_count = min(max(mixed.images, settings.calibration_images), len(data))
    images = data.load(list(range(calibration_count))).float() / 255
    with progress.task("sensitivity", 1, "measurements") as task:
        rows = measure(
            teacher,
            policy,
            images[:count].split(_BATCH),
            settings.candidates(),
            search=settings.local_search,
            rounding=settings.rounding,
            calibration=images.split(_BATCH),
            progress=task.update,
        )
    if mixed.budget is None:
        return Sensitivity(tuple(rows), mixed.cost, count)
    budget = budget_of(mixed.budget, rows, mixed.cost)
    return Sensitivity(tuple(rows), mixed.cost, count, budget, allocate(rows, budget, mixed.cost))
