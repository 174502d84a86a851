"""What the adapters are asked about: two small images and the objects in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfq.models.base import Targets


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def targets() -> Targets:
    rows = [
        [0, 3, 0.30, 0.40, 0.35, 0.50],
        [0, 7, 0.70, 0.60, 0.40, 0.60],
        [1, 3, 0.50, 0.50, 0.80, 0.70],
    ]
    return Targets(torch.tensor(rows))
