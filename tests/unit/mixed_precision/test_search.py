"""From a recipe's section to the bits of each layer."""

from __future__ import annotations

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor

from dfq.graph.fold_batchnorm import fold
from dfq.mixed_precision.search import find_bits
from dfq.mixed_precision.sensitivity import measure
from dfq.models.base import Targets
from dfq.quantization.policy import Policy
from dfq.quantization.settings import Quantization
from dfq.runtime.progress import Silent


class Images:
    """Eight images without labels."""

    def __init__(self) -> None:
        self.pixels = (blobs(8) * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, indices: list[int]) -> Tensor:
        return self.pixels[indices]

    def targets(self, indices: list[int]) -> Targets:
        return Targets.from_per_image([torch.zeros(0, 5) for _ in indices])


@pytest.mark.parametrize("rounding", ["gptq", "none"])
def test_the_recipe_says_on_which_images_and_with_which_rounding(rounding: str) -> None:
    teacher, data, policy = fold(tiny_detector()), Images(), Policy()
    mixed = {"candidates": [3, 5], "images": 3}
    settings = Quantization.model_validate(
        {"reconstruction": rounding, "calibration_images": 6, "ranges": "minmax", "mixed": mixed}
    )
    found = find_bits(teacher, policy, settings, data, Silent())
    assert found.images == 3
    pixels = data.pixels.float() / 255
    expected = measure(
        teacher,
        policy,
        [pixels[:3]],
        [(3, 8), (5, 8)],
        search="minmax",
        rounding="nearest" if rounding == "none" else rounding,
        calibration=[pixels[:6]],
    )
    for ours, theirs in zip(found.layers, expected, strict=True):
        assert ours.divergence == pytest.approx(theirs.divergence, rel=1e-3, abs=1e-6)
