"""Total variation and its squared form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfq.kernels import loader as compiled
from dfq.synthesis.losses.total_variation import squared_variation, total_variation


def neighbour_differences(images: Tensor) -> list[Tensor]:
    """Per direction, of every pair of neighbours, pixel by pixel."""
    height, width = images.shape[2:]
    result = []
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        pairs = [
            images[:, :, y + down, x + across] - images[:, :, y, x]
            for y in range(height - down)
            for x in range(max(0, -across), width - max(0, across))
        ]
        result.append(torch.stack(pairs))
    return result


def test_total_variation_is_the_sum_of_four_norms() -> None:
    images = torch.rand(2, 3, 5, 7)
    expected = sum(d.norm() for d in neighbour_differences(images))
    torch.testing.assert_close(total_variation(images), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(5, 7), (1, 4), (4, 1), (2, 2), (3, 40)])
@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_squared_variation_and_its_gradient(
    size: tuple[int, int], layout: torch.memory_format, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr(compiled, "_library", lambda: None)
    images = torch.rand(2, 3, *size).contiguous(memory_format=layout).requires_grad_()
    height, width = size
    small = [
        images[:, :, 1:] - images[:, :, :-1],
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
    ]
    total = sum(d.square().sum() for d in small)
    if height > 1 and width > 1:
        torch.testing.assert_close(
            total, sum(d.square().sum() for d in neighbour_differences(images))
        )
    (expected,) = torch.autograd.grad(total / 2, images)
    value, gradient, norms = squared_variation(images.detach())
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(norms, torch.stack([image.norm() for image in expected]))
    torch.testing.assert_close(value, total.detach() / images.numel())


def test_both_forms_pull_the_same_way() -> None:
    images = torch.rand(1, 3, 16, 16).requires_grad_()
    (norm,) = torch.autograd.grad(total_variation(images), images)
    _, squared, _ = squared_variation(images.detach())
    assert torch.nn.functional.cosine_similarity(norm.flatten(), squared.flatten(), dim=0) > 0.99
