"""How far what a classifier's file says moved from what its float model says, by category, without
any label; and how accurate both are where there are labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..evaluation.classification import divergences
from ..models.coco_categories import distinct_names
from .parity import Distance, distance
from .verify import Accuracy, Movement, beside

_WORST = 5
_FEWEST = 3
"""Images of a category without which nothing is said of it."""


@dataclass(frozen=True)
class ClassGroup:
    """The images that the float model takes for one category.

    Attributes:
        images: how many.
        same: those that the file takes for it too.
        most_to: what it takes most of the others for; None where there are none.
        most_to_images: how many those are.
        probability_shift: mean of the category's probability in the file, less the float model's.
    """

    images: int
    same: int
    most_to: str | None
    most_to_images: int
    probability_shift: float

    @property
    def share(self) -> float:
        """Of the images, those of the same category."""
        return self.same / self.images


@dataclass(frozen=True)
class ClassMoved(Movement):
    """What a file says against what its float model says.

    Attributes:
        images: of how many images.
        same: those for which both find the same category likeliest.
        divergence: mean of KL(float || file) of the probabilities, nats.
        probability_shift: mean of the float model's likeliest category's probability in the file,
            less that in the float model.
        logits: how far the logits are apart, in steps of the float model's range / 255; None where
            one of them gives probabilities.
        categories: by name, in the order of the categories.
        against: what the float model is.
    """

    images: int
    same: int
    divergence: float
    probability_shift: float
    logits: Distance | None
    categories: dict[str, ClassGroup]
    against: str
    side_ratio = None
    threshold = None

    @property
    def share(self) -> float:
        """Of the images, those of the same category."""
        return self.same / self.images

    def as_before(self) -> bool:
        return self.share >= 0.98 and self.divergence <= 0.05

    def clause(self) -> str:
        return f"{self.share:.1%} of the {self.against}'s likeliest categories kept"

    def lines(self) -> list[str]:
        text = [
            f"moved: the {self.against}'s likeliest category is kept in {self.same} of "
            f"{self.images} images ({self.share:.1%}), its probability "
            f"{self.probability_shift:+.3f}; divergence {self.divergence:.4g} an image"
        ]
        if self.logits is not None:
            text.append(
                f"  logits: mean {self.logits.mean_steps:.2f}, most {self.logits.max_steps:.1f} "
                f"steps of {self.logits.step:.3g} apart"
            )
        worst = sorted(
            (item for item in self.categories.items() if item[1].images >= _FEWEST),
            key=lambda item: item[1].share,
        )
        for name, group in worst[:_WORST]:
            if group.same < group.images:
                others = f", {group.most_to_images} become {group.most_to}"
                text.append(f"  {name}: {group.same} of {group.images}{others}")
        return text

    def to_dict(self) -> dict[str, Any]:
        logits = None if self.logits is None else asdict(self.logits)
        return {
            "images": self.images,
            "same": self.same,
            "same_share": self.share,
            "divergence": self.divergence if math.isfinite(self.divergence) else None,
            "probability_shift": self.probability_shift,
            "logits": logits,
            "categories": {
                name: {**asdict(group), "same_share": group.share}
                for name, group in self.categories.items()
            },
            "against": self.against,
        }


def moved_classes(
    reference: Tensor,
    logits: Tensor,
    names: Sequence[str],
    against: str,
    *,
    as_logits: bool = True,
) -> ClassMoved:
    """Compare what two classifiers say of the same images.

    Args:
        reference: the float model's logits, `(n, classes)`.
        logits: the file's.
        names: of the categories.
        against: what the float model is, for the record.
        as_logits: whether both are logits as the networks give them, and not probabilities'
            logarithms.
    """
    before, after = reference.argmax(dim=1), logits.argmax(dim=1)
    rows = before[:, None]
    sure, now = (
        values.double().softmax(dim=1).gather(1, rows)[:, 0] for values in (reference, logits)
    )
    groups, told_apart = {}, distinct_names(names, range(len(names)))
    for label in before.unique().tolist():
        inside = before == label
        others = Counter(after[inside & (after != label)].tolist()).most_common(1)
        groups[told_apart[label]] = ClassGroup(
            int(inside.sum()),
            int((after[inside] == label).sum()),
            told_apart[others[0][0]] if others else None,
            others[0][1] if others else 0,
            float((now - sure)[inside].mean()),
        )
    return ClassMoved(
        len(before),
        int((before == after).sum()),
        round(float(divergences(logits, reference).mean()), 6),
        float((now - sure).mean()),
        distance(reference.numpy(), logits.numpy()) if as_logits else None,
        groups,
        against,
    )


@dataclass(frozen=True)
class ClassAccuracy(Accuracy):
    """Of the file, of its reference in PyTorch, and of the float model.

    Attributes:
        data: the set.
        images: how many of it were measured.
        top1, top5: of the file, fractions in [0, 1].
        f1_micro, f1_macro: see `ClassificationMetrics`.
        reference_top1, float_top1: None where not measured.
        difference: 95 % interval of top1 minus reference_top1 over the draw of images.
        by_position: whether categories were matched by position.
    """

    data: str
    images: int
    top1: float
    top5: float
    f1_micro: float
    f1_macro: float
    reference_top1: float | None = None
    float_top1: float | None = None
    difference: tuple[float, float] | None = None
    by_position: bool = False
    metric = "top-1"

    @property
    def figures(self) -> tuple[float | None, float | None]:
        return self.top1, self.reference_top1

    def lines(self) -> list[str]:
        cells = {"file": self.top1, "PyTorch": self.reference_top1, "float": self.float_top1}
        matched = ", categories matched by position" if self.by_position else ""
        return [
            f"top-1 on {self.images} images of {self.data}{matched}: "
            f"{beside(cells, self.difference)}",
            f"of the file: top-5 {self.top5:.4f}, micro F1 {self.f1_micro:.4f}, macro F1 "
            f"{self.f1_macro:.4f}",
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
