"""The measure that tells low-bit networks apart."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor

from dfq.evaluation.divergence import mean_divergence
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Targets
from dfq.ptq.pipeline import quantized
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.recipe import load_recipe
from dfq.runtime.progress import Silent


class Images:
    """Blobs as a set."""

    def __init__(self, count: int) -> None:
        self.pixels = (blobs(count) * 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, indices: list[int]) -> Tensor:
        return self.pixels[indices]

    def targets(self, indices: list[int]) -> Targets:
        raise AssertionError("labels do not count")


def test_the_divergence_is_a_mean_over_the_images() -> None:
    teacher, student = tiny_detector(), tiny_detector(seed=1)
    # More than a batch, and the last one not full.
    images = Images(19)
    each = []
    for index in range(19):
        one = Images(19)
        one.pixels = one.pixels[index : index + 1]
        each.append(mean_divergence(student, teacher, one))
    assert min(each) > 0
    found = mean_divergence(student, teacher, images)
    assert found == pytest.approx(sum(each) / 19, rel=1e-4)
    assert mean_divergence(teacher, teacher, images) == pytest.approx(0, abs=1e-5)


def test_the_policy_has_all_that_the_recipe_says_of_it() -> None:
    other = {
        "weight_bits": 3, "activation_bits": 6, "first_last_bits": "same", "weights": "per_tensor",
        "weight_grid": "symmetric", "activations": "symmetric", "scope": "backbone",
        "placement": "everywhere", "runtime": "litert", "overrides": {"model.0.*": 5},
        "activation_ranges": "dynamic", "softmax": "log2",
    }  # fmt: skip
    assert set(other) == {field.name for field in fields(Policy)}
    recipe = load_recipe(None, ["method=ptq", f"quantization={json.dumps(other)}"])
    found = recipe.quantization.policy().to_dict()
    assert found == {**other, "overrides": [["model.0.*", 5]]}
    assert all(found[name] != value for name, value in Policy().to_dict().items())


@pytest.mark.parametrize(("ranges", "strict"), [("lsq", True), ("mse", False)])
def test_values_beyond_a_grid_have_no_gradient_in_lsq(ranges: str, strict: bool) -> None:
    recipe = load_recipe(None, [f"quantization.ranges={ranges}"])
    teacher = fold(tiny_detector())
    student = quantized(teacher, recipe.quantization.policy(), recipe.quantization, None, Silent())
    found = [m for m in student.module.modules() if isinstance(m, Quantizer)]
    assert len(found) == 2 * 18
    assert {quantizer.strict for quantizer in found} == {strict}
    quantizer = found[0]
    quantizer.initialise(torch.ones(quantizer.channels))
    top = quantizer.bounds[1] + 0.3
    x = torch.full((quantizer.channels, 2), top, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 0).all()) is strict
